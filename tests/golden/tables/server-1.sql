CREATE INDEX certificates_device ON certificates (device, issued_at);
CREATE INDEX events_device ON events (device, at);
CREATE INDEX members_device ON members (device);
CREATE TABLE audit ( number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, actor TEXT NOT NULL, act TEXT NOT NULL, subject TEXT NOT NULL, detail TEXT NOT NULL DEFAULT '' );
CREATE TABLE certificates ( serial TEXT PRIMARY KEY, device TEXT NOT NULL, not_after REAL NOT NULL, issued_at REAL NOT NULL, pem TEXT NOT NULL, revoked INTEGER NOT NULL DEFAULT 0 ) WITHOUT ROWID;
CREATE TABLE devices ( id TEXT PRIMARY KEY, name TEXT NOT NULL, machine TEXT NOT NULL DEFAULT '', sealing_key TEXT NOT NULL, key_sha256 TEXT NOT NULL UNIQUE, enrolled_at REAL NOT NULL, labels TEXT NOT NULL DEFAULT '{}', revoked INTEGER NOT NULL DEFAULT 0, commands INTEGER NOT NULL DEFAULT 0, online INTEGER NOT NULL DEFAULT 0, seen_at REAL, boot_id TEXT NOT NULL DEFAULT '', versions TEXT NOT NULL DEFAULT '{}', accepted INTEGER NOT NULL DEFAULT 0, deployed INTEGER NOT NULL DEFAULT 0, committed INTEGER NOT NULL DEFAULT 0, acked INTEGER NOT NULL DEFAULT 0, health_at REAL, health BLOB ) WITHOUT ROWID;
CREATE TABLE events ( id INTEGER PRIMARY KEY, device TEXT NOT NULL, at REAL NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL, rollout TEXT NOT NULL DEFAULT '', assignment INTEGER NOT NULL DEFAULT 0 );
CREATE TABLE groups ( name TEXT PRIMARY KEY, priority INTEGER NOT NULL DEFAULT 0, selector TEXT NOT NULL DEFAULT '{}', created_at REAL NOT NULL ) WITHOUT ROWID;
CREATE TABLE members ( "group" TEXT NOT NULL REFERENCES groups(name), device TEXT NOT NULL REFERENCES devices(id), PRIMARY KEY ("group", device) ) WITHOUT ROWID;
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE operators ( name TEXT PRIMARY KEY, token_sha256 TEXT NOT NULL UNIQUE, role TEXT NOT NULL, created_at REAL NOT NULL ) WITHOUT ROWID;
CREATE TABLE sqlite_sequence(name,seq);
CREATE TABLE tokens ( secret_sha256 TEXT PRIMARY KEY, "group" TEXT NOT NULL, created_at REAL NOT NULL, expires REAL NOT NULL, used_at REAL, device TEXT, by TEXT NOT NULL, root_sha256 TEXT NOT NULL ) WITHOUT ROWID;
CREATE TRIGGER audit_is_append_only_1 BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_is_append_only_2 BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
PRAGMA user_version=1;

-- audit: number INTEGER key 1
-- audit: at REAL not null
-- audit: actor TEXT not null
-- audit: act TEXT not null
-- audit: subject TEXT not null
-- audit: detail TEXT not null default ''
-- certificates: serial TEXT not null key 1
-- certificates: device TEXT not null
-- certificates: not_after REAL not null
-- certificates: issued_at REAL not null
-- certificates: pem TEXT not null
-- certificates: revoked INTEGER not null default 0
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
-- events: id INTEGER key 1
-- events: device TEXT not null
-- events: at REAL not null
-- events: kind TEXT not null
-- events: text TEXT not null
-- events: rollout TEXT not null default ''
-- events: assignment INTEGER not null default 0
-- groups: name TEXT not null key 1
-- groups: priority INTEGER not null default 0
-- groups: selector TEXT not null default '{}'
-- groups: created_at REAL not null
-- members: group TEXT not null key 1
-- members: device TEXT not null key 2
-- meta: key TEXT not null key 1
-- meta: value TEXT not null
-- operators: name TEXT not null key 1
-- operators: token_sha256 TEXT not null
-- operators: role TEXT not null
-- operators: created_at REAL not null
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
