CREATE TABLE changes (instance TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE committed (instance TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE failed (instance TEXT, key TEXT, attempt INTEGER, body BLOB NOT NULL, PRIMARY KEY (instance, key, attempt)) WITHOUT ROWID;
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE outbox (sequence INTEGER PRIMARY KEY AUTOINCREMENT, instance TEXT NOT NULL, progress INTEGER NOT NULL, acked INTEGER NOT NULL DEFAULT 0, body BLOB NOT NULL);
CREATE TABLE sqlite_sequence(name,seq);
PRAGMA user_version=1;

-- changes: instance TEXT not null key 1
-- changes: body BLOB not null
-- committed: instance TEXT not null key 1
-- committed: body BLOB not null
-- counters: name TEXT not null key 1
-- counters: value INTEGER not null
-- failed: instance TEXT not null key 1
-- failed: key TEXT not null key 2
-- failed: attempt INTEGER not null key 3
-- failed: body BLOB not null
-- meta: name TEXT not null key 1
-- meta: value BLOB not null
-- outbox: sequence INTEGER key 1
-- outbox: instance TEXT not null
-- outbox: progress INTEGER not null
-- outbox: acked INTEGER not null default 0
-- outbox: body BLOB not null
-- sqlite_sequence: name
-- sqlite_sequence: seq
