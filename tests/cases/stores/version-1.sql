-- What the first release of edgevit made of an empty database; @BLOB@ stands for the type of bytes.
CREATE TABLE edgevit_migrations (
 number INTEGER NOT NULL,
 applied_at VARCHAR(40) NOT NULL,
 PRIMARY KEY (number)
);
CREATE TABLE batches (
 batch_id VARCHAR(60) NOT NULL,
 created_at VARCHAR(40) NOT NULL,
 command TEXT NOT NULL,
 PRIMARY KEY (batch_id)
);
CREATE TABLE runs (
 run_id VARCHAR(60) NOT NULL,
 batch_id VARCHAR(60) NOT NULL,
 target TEXT NOT NULL,
 board TEXT NOT NULL,
 status VARCHAR(20) NOT NULL,
 started_at VARCHAR(40) NOT NULL,
 ended_at VARCHAR(40) NOT NULL,
 document TEXT NOT NULL,
 PRIMARY KEY (run_id),
 FOREIGN KEY(batch_id) REFERENCES batches (batch_id)
);
CREATE INDEX runs_by_target ON runs (target, started_at);
CREATE INDEX ix_runs_batch_id ON runs (batch_id);
CREATE TABLE measurements (
 run_id VARCHAR(60) NOT NULL,
 position INTEGER NOT NULL,
 model TEXT NOT NULL,
 recipe TEXT NOT NULL,
 bundle VARCHAR(64) NOT NULL,
 bundle_name TEXT NOT NULL,
 artifact TEXT NOT NULL,
 artifact_sha256 VARCHAR(64) NOT NULL,
 format VARCHAR(20) NOT NULL,
 scheme VARCHAR(40) NOT NULL,
 runtime VARCHAR(40) NOT NULL,
 provider TEXT NOT NULL,
 threads INTEGER NOT NULL,
 failure VARCHAR(60),
 images INTEGER,
 correct INTEGER,
 predictions @BLOB@,
 labels @BLOB@,
 PRIMARY KEY (run_id, position),
 FOREIGN KEY(run_id) REFERENCES runs (run_id)
);
CREATE TABLE series (
 run_id VARCHAR(60) NOT NULL,
 position INTEGER NOT NULL,
 number INTEGER NOT NULL,
 sample_count INTEGER NOT NULL,
 samples @BLOB@ NOT NULL,
 warmup @BLOB@ NOT NULL,
 PRIMARY KEY (run_id, position, number),
 FOREIGN KEY(run_id) REFERENCES runs (run_id)
);
INSERT INTO edgevit_migrations VALUES (1, '2025-01-01T00:00:00Z');
