CREATE INDEX certificates_device ON certificates (device, issued_at);
CREATE INDEX events_device ON events (device, at);
CREATE INDEX members_device ON members (device);
CREATE INDEX readings_device ON readings (device, id);
CREATE INDEX readings_received ON readings (received_at);
CREATE UNIQUE INDEX readings_sequence ON readings (device, epoch, instance, sequence);
CREATE INDEX reports_device ON reports (device, at);
CREATE INDEX rollout_devices_device ON rollout_devices (device);
CREATE INDEX rollouts_state ON rollouts (state);
CREATE TABLE alerts ( device TEXT NOT NULL, kind TEXT NOT NULL, since REAL NOT NULL, until REAL NOT NULL, text TEXT NOT NULL, PRIMARY KEY (device, kind) ) WITHOUT ROWID;
CREATE TABLE artifacts ( sha256 TEXT PRIMARY KEY, length INTEGER NOT NULL, stored_at REAL NOT NULL, by TEXT NOT NULL ) WITHOUT ROWID;
CREATE TABLE assignments ( device TEXT NOT NULL, version INTEGER NOT NULL, sha256 TEXT NOT NULL, issued REAL NOT NULL, expires REAL NOT NULL, wanted TEXT NOT NULL, envelope BLOB NOT NULL, PRIMARY KEY (device, version) ) WITHOUT ROWID;
CREATE TABLE attempts ( device TEXT NOT NULL, instance TEXT NOT NULL, attempt INTEGER NOT NULL, PRIMARY KEY (device, instance) ) WITHOUT ROWID;
CREATE TABLE audit ( number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, actor TEXT NOT NULL, act TEXT NOT NULL, subject TEXT NOT NULL, detail TEXT NOT NULL DEFAULT '' );
CREATE TABLE boxes ( device TEXT NOT NULL, instance TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, sha256 TEXT NOT NULL, box BLOB NOT NULL, sealed TEXT NOT NULL, by TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (device, instance, name, version) ) WITHOUT ROWID;
CREATE TABLE certificates ( serial TEXT PRIMARY KEY, device TEXT NOT NULL, not_after REAL NOT NULL, issued_at REAL NOT NULL, pem TEXT NOT NULL, revoked INTEGER NOT NULL DEFAULT 0 ) WITHOUT ROWID;
CREATE TABLE consumers ( user TEXT PRIMARY KEY, name TEXT NOT NULL, "group" TEXT NOT NULL, topics TEXT NOT NULL, created_at REAL NOT NULL, ends_at REAL NOT NULL, revoked INTEGER NOT NULL ) WITHOUT ROWID;
CREATE TABLE device_keys ( device TEXT NOT NULL, instance TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (device, instance, key) ) WITHOUT ROWID;
CREATE TABLE devices ( id TEXT PRIMARY KEY, name TEXT NOT NULL, machine TEXT NOT NULL DEFAULT '', sealing_key TEXT NOT NULL, key_sha256 TEXT NOT NULL UNIQUE, enrolled_at REAL NOT NULL, labels TEXT NOT NULL DEFAULT '{}', revoked INTEGER NOT NULL DEFAULT 0, commands INTEGER NOT NULL DEFAULT 0, online INTEGER NOT NULL DEFAULT 0, seen_at REAL, boot_id TEXT NOT NULL DEFAULT '', versions TEXT NOT NULL DEFAULT '{}', accepted INTEGER NOT NULL DEFAULT 0, deployed INTEGER NOT NULL DEFAULT 0, committed INTEGER NOT NULL DEFAULT 0, acked INTEGER NOT NULL DEFAULT 0, health_at REAL, health BLOB , signs INTEGER NOT NULL DEFAULT 0, sealing_proof TEXT NOT NULL DEFAULT '') WITHOUT ROWID;
CREATE TABLE events ( id INTEGER PRIMARY KEY, device TEXT NOT NULL, at REAL NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL, rollout TEXT NOT NULL DEFAULT '', assignment INTEGER NOT NULL DEFAULT 0 );
CREATE TABLE freezes ( "group" TEXT PRIMARY KEY, reason TEXT NOT NULL, by TEXT NOT NULL, at REAL NOT NULL ) WITHOUT ROWID;
CREATE TABLE groups ( name TEXT PRIMARY KEY, priority INTEGER NOT NULL DEFAULT 0, selector TEXT NOT NULL DEFAULT '{}', created_at REAL NOT NULL , policy TEXT NOT NULL DEFAULT 'null') WITHOUT ROWID;
CREATE TABLE members ( "group" TEXT NOT NULL REFERENCES groups(name), device TEXT NOT NULL REFERENCES devices(id), PRIMARY KEY ("group", device) ) WITHOUT ROWID;
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE operators ( name TEXT PRIMARY KEY, token_sha256 TEXT NOT NULL UNIQUE, role TEXT NOT NULL, created_at REAL NOT NULL ) WITHOUT ROWID;
CREATE TABLE reading_positions ( device TEXT PRIMARY KEY, epoch TEXT NOT NULL, position INTEGER NOT NULL, bytes INTEGER NOT NULL DEFAULT 0 ) WITHOUT ROWID;
CREATE TABLE readings ( id INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, epoch TEXT NOT NULL, instance TEXT NOT NULL, sequence INTEGER NOT NULL, at REAL NOT NULL, received_at REAL NOT NULL, topic TEXT NOT NULL, content_type TEXT NOT NULL, metadata TEXT NOT NULL, data BLOB NOT NULL, size INTEGER NOT NULL );
CREATE TABLE reports ( device TEXT NOT NULL, boot_id TEXT NOT NULL, sequence INTEGER NOT NULL, at REAL NOT NULL, rollout TEXT NOT NULL, raw BLOB NOT NULL, PRIMARY KEY (device, boot_id, sequence) ) WITHOUT ROWID;
CREATE TABLE "rollout_devices" ( rollout INTEGER NOT NULL REFERENCES "rollouts"(number), device TEXT NOT NULL, outcome TEXT NOT NULL, wave INTEGER NOT NULL, member TEXT NOT NULL, offered_at REAL, acked_at REAL, ended_at REAL, previous TEXT NOT NULL DEFAULT '', version INTEGER NOT NULL DEFAULT 0, timings_ms TEXT NOT NULL DEFAULT '{}', log TEXT NOT NULL DEFAULT '[]', PRIMARY KEY (rollout, device) ) WITHOUT ROWID;
CREATE TABLE "rollouts" ( number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, "group" TEXT NOT NULL, device TEXT NOT NULL, instance TEXT NOT NULL, value TEXT NOT NULL, before TEXT NOT NULL, state TEXT NOT NULL, waves TEXT NOT NULL, plan TEXT NOT NULL, progress TEXT NOT NULL, revision INTEGER NOT NULL DEFAULT 1, reason TEXT NOT NULL DEFAULT '', note TEXT NOT NULL DEFAULT '', by TEXT NOT NULL, undoes TEXT NOT NULL DEFAULT '', superseded_by INTEGER NOT NULL DEFAULT 0, created_at REAL NOT NULL, ended_at REAL );
CREATE TABLE secret_versions ( instance TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (instance, name) ) WITHOUT ROWID;
CREATE TABLE settled ( "group" TEXT NOT NULL, device TEXT NOT NULL, instance TEXT NOT NULL, value TEXT NOT NULL, since REAL NOT NULL, rollout TEXT NOT NULL, PRIMARY KEY ("group", device, instance) ) WITHOUT ROWID;
CREATE TABLE settled_history ( id INTEGER PRIMARY KEY, "group" TEXT NOT NULL, device TEXT NOT NULL, instance TEXT NOT NULL, value TEXT NOT NULL, since REAL NOT NULL, until REAL NOT NULL, rollout TEXT NOT NULL );
CREATE TABLE sqlite_sequence(name,seq);
CREATE TABLE tokens ( secret_sha256 TEXT PRIMARY KEY, "group" TEXT NOT NULL, created_at REAL NOT NULL, expires REAL NOT NULL, used_at REAL, device TEXT, by TEXT NOT NULL, root_sha256 TEXT NOT NULL ) WITHOUT ROWID;
CREATE TRIGGER audit_is_append_only_1 BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_is_append_only_2 BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER readings_added AFTER INSERT ON readings BEGIN UPDATE reading_positions SET bytes = bytes + NEW.size WHERE device = NEW.device; END;
CREATE TRIGGER readings_removed AFTER DELETE ON readings BEGIN UPDATE reading_positions SET bytes = bytes - OLD.size WHERE device = OLD.device; END;
PRAGMA user_version=9;

-- alerts: device TEXT not null key 1
-- alerts: kind TEXT not null key 2
-- alerts: since REAL not null
-- alerts: until REAL not null
-- alerts: text TEXT not null
-- artifacts: sha256 TEXT not null key 1
-- artifacts: length INTEGER not null
-- artifacts: stored_at REAL not null
-- artifacts: by TEXT not null
-- assignments: device TEXT not null key 1
-- assignments: version INTEGER not null key 2
-- assignments: sha256 TEXT not null
-- assignments: issued REAL not null
-- assignments: expires REAL not null
-- assignments: wanted TEXT not null
-- assignments: envelope BLOB not null
-- attempts: device TEXT not null key 1
-- attempts: instance TEXT not null key 2
-- attempts: attempt INTEGER not null
-- audit: number INTEGER key 1
-- audit: at REAL not null
-- audit: actor TEXT not null
-- audit: act TEXT not null
-- audit: subject TEXT not null
-- audit: detail TEXT not null default ''
-- boxes: device TEXT not null key 1
-- boxes: instance TEXT not null key 2
-- boxes: name TEXT not null key 3
-- boxes: version INTEGER not null key 4
-- boxes: sha256 TEXT not null
-- boxes: box BLOB not null
-- boxes: sealed TEXT not null
-- boxes: by TEXT not null
-- boxes: at REAL not null
-- certificates: serial TEXT not null key 1
-- certificates: device TEXT not null
-- certificates: not_after REAL not null
-- certificates: issued_at REAL not null
-- certificates: pem TEXT not null
-- certificates: revoked INTEGER not null default 0
-- consumers: user TEXT not null key 1
-- consumers: name TEXT not null
-- consumers: group TEXT not null
-- consumers: topics TEXT not null
-- consumers: created_at REAL not null
-- consumers: ends_at REAL not null
-- consumers: revoked INTEGER not null
-- device_keys: device TEXT not null key 1
-- device_keys: instance TEXT not null key 2
-- device_keys: key TEXT not null key 3
-- device_keys: value TEXT not null
-- devices: id TEXT not null key 1
-- devices: name TEXT not null
-- devices: machine TEXT not null default ''
-- devices: sealing_key TEXT not null
-- devices: key_sha256 TEXT not null
-- devices: enrolled_at REAL not null
-- devices: labels TEXT not null default '{}'
-- devices: revoked INTEGER not null default 0
-- devices: commands INTEGER not null default 0
-- devices: online INTEGER not null default 0
-- devices: seen_at REAL
-- devices: boot_id TEXT not null default ''
-- devices: versions TEXT not null default '{}'
-- devices: accepted INTEGER not null default 0
-- devices: deployed INTEGER not null default 0
-- devices: committed INTEGER not null default 0
-- devices: acked INTEGER not null default 0
-- devices: health_at REAL
-- devices: health BLOB
-- devices: signs INTEGER not null default 0
-- devices: sealing_proof TEXT not null default ''
-- events: id INTEGER key 1
-- events: device TEXT not null
-- events: at REAL not null
-- events: kind TEXT not null
-- events: text TEXT not null
-- events: rollout TEXT not null default ''
-- events: assignment INTEGER not null default 0
-- freezes: group TEXT not null key 1
-- freezes: reason TEXT not null
-- freezes: by TEXT not null
-- freezes: at REAL not null
-- groups: name TEXT not null key 1
-- groups: priority INTEGER not null default 0
-- groups: selector TEXT not null default '{}'
-- groups: created_at REAL not null
-- groups: policy TEXT not null default 'null'
-- members: group TEXT not null key 1
-- members: device TEXT not null key 2
-- meta: key TEXT not null key 1
-- meta: value TEXT not null
-- operators: name TEXT not null key 1
-- operators: token_sha256 TEXT not null
-- operators: role TEXT not null
-- operators: created_at REAL not null
-- reading_positions: device TEXT not null key 1
-- reading_positions: epoch TEXT not null
-- reading_positions: position INTEGER not null
-- reading_positions: bytes INTEGER not null default 0
-- readings: id INTEGER key 1
-- readings: device TEXT not null
-- readings: epoch TEXT not null
-- readings: instance TEXT not null
-- readings: sequence INTEGER not null
-- readings: at REAL not null
-- readings: received_at REAL not null
-- readings: topic TEXT not null
-- readings: content_type TEXT not null
-- readings: metadata TEXT not null
-- readings: data BLOB not null
-- readings: size INTEGER not null
-- reports: device TEXT not null key 1
-- reports: boot_id TEXT not null key 2
-- reports: sequence INTEGER not null key 3
-- reports: at REAL not null
-- reports: rollout TEXT not null
-- reports: raw BLOB not null
-- rollout_devices: rollout INTEGER not null key 1
-- rollout_devices: device TEXT not null key 2
-- rollout_devices: outcome TEXT not null
-- rollout_devices: wave INTEGER not null
-- rollout_devices: member TEXT not null
-- rollout_devices: offered_at REAL
-- rollout_devices: acked_at REAL
-- rollout_devices: ended_at REAL
-- rollout_devices: previous TEXT not null default ''
-- rollout_devices: version INTEGER not null default 0
-- rollout_devices: timings_ms TEXT not null default '{}'
-- rollout_devices: log TEXT not null default '[]'
-- rollouts: number INTEGER key 1
-- rollouts: id TEXT not null
-- rollouts: group TEXT not null
-- rollouts: device TEXT not null
-- rollouts: instance TEXT not null
-- rollouts: value TEXT not null
-- rollouts: before TEXT not null
-- rollouts: state TEXT not null
-- rollouts: waves TEXT not null
-- rollouts: plan TEXT not null
-- rollouts: progress TEXT not null
-- rollouts: revision INTEGER not null default 1
-- rollouts: reason TEXT not null default ''
-- rollouts: note TEXT not null default ''
-- rollouts: by TEXT not null
-- rollouts: undoes TEXT not null default ''
-- rollouts: superseded_by INTEGER not null default 0
-- rollouts: created_at REAL not null
-- rollouts: ended_at REAL
-- secret_versions: instance TEXT not null key 1
-- secret_versions: name TEXT not null key 2
-- secret_versions: version INTEGER not null
-- settled: group TEXT not null key 1
-- settled: device TEXT not null key 2
-- settled: instance TEXT not null key 3
-- settled: value TEXT not null
-- settled: since REAL not null
-- settled: rollout TEXT not null
-- settled_history: id INTEGER key 1
-- settled_history: group TEXT not null
-- settled_history: device TEXT not null
-- settled_history: instance TEXT not null
-- settled_history: value TEXT not null
-- settled_history: since REAL not null
-- settled_history: until REAL not null
-- settled_history: rollout TEXT not null
-- sqlite_sequence: name
-- sqlite_sequence: seq
-- tokens: secret_sha256 TEXT not null key 1
-- tokens: group TEXT not null
-- tokens: created_at REAL not null
-- tokens: expires REAL not null
-- tokens: used_at REAL
-- tokens: device TEXT
-- tokens: by TEXT not null
-- tokens: root_sha256 TEXT not null
