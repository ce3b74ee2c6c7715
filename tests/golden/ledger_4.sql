PRAGMA user_version = 4;
BEGIN TRANSACTION;
CREATE TABLE evaluations (
    round INTEGER NOT NULL,
    name TEXT NOT NULL,
    value REAL,                  -- NULL: not a number
    PRIMARY KEY (round, name)
);
CREATE TABLE late (             -- work that came after its round was closed: it is not in the model
    round INTEGER NOT NULL,
    hotkey TEXT NOT NULL,
    done TEXT NOT NULL,          -- JSON: the index ranges that were computed [[start, stop], …]
    seconds REAL NOT NULL,       -- from the order to the reply, on the validator's clock
    reply TEXT NOT NULL,         -- JSON: the miner's signed reply
    receipt TEXT NOT NULL,       -- JSON: the signed receipt that tells it so
    noted_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    PRIMARY KEY (round, hotkey),
    FOREIGN KEY (round, hotkey) REFERENCES orders (round, hotkey)
);
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
INSERT INTO "meta" VALUES('task','"gpt2"');
CREATE TABLE orders (            -- of committed rounds and of the open one
    round INTEGER NOT NULL,
    hotkey TEXT NOT NULL,
    body TEXT NOT NULL,
    signer TEXT NOT NULL,
    signature TEXT NOT NULL,
    PRIMARY KEY (round, hotkey)
);
INSERT INTO "orders" VALUES(0,'5AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA','{"protocol":"pilot/2","run":"run","round":0,"hotkey":"5AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA","version":"abababababababababababababababababababababababababababababababab","update":{"base":null,"steps":[{"kind":"state","codec":"fp32","digest":"abababababababababababababababababababababababababababababababab","bytes":100}],"snapshots":[]},"state_digest":null,"task":{"name":"gpt2","parameters":{"depth":2}},"data":{"tokens":{"kind":"data","digest":"abababababababababababababababababababababababababababababababab","bytes":7},"tokenizer":"byte","vocabulary":null,"source":null,"column":"text","rows":0,"max_bytes":0,"validation":0.05},"ranges":[[0,1]],"deadline_s":10.0,"staleness":0,"codec_up":"fp32","codec_down":"fp32","budget_s":0.0,"inner_steps":null,"feedback":0.0}','5VVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVV','0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f');
INSERT INTO "orders" VALUES(0,'5BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB','{"protocol":"pilot/2","run":"run","round":0,"hotkey":"5BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB","version":"abababababababababababababababababababababababababababababababab","update":{"base":null,"steps":[{"kind":"state","codec":"fp32","digest":"abababababababababababababababababababababababababababababababab","bytes":100}],"snapshots":[]},"state_digest":null,"task":{"name":"gpt2","parameters":{"depth":2}},"data":{"tokens":{"kind":"data","digest":"abababababababababababababababababababababababababababababababab","bytes":7},"tokenizer":"byte","vocabulary":null,"source":null,"column":"text","rows":0,"max_bytes":0,"validation":0.05},"ranges":[[0,1]],"deadline_s":10.0,"staleness":0,"codec_up":"fp32","codec_down":"fp32","budget_s":0.0,"inner_steps":null,"feedback":0.0}','5VVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVV','0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f');
INSERT INTO "orders" VALUES(1,'5AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA','{"protocol":"pilot/2","run":"run","round":1,"hotkey":"5AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA","version":"abababababababababababababababababababababababababababababababab","update":{"base":null,"steps":[{"kind":"state","codec":"fp32","digest":"abababababababababababababababababababababababababababababababab","bytes":100}],"snapshots":[]},"state_digest":null,"task":{"name":"gpt2","parameters":{"depth":2}},"data":{"tokens":{"kind":"data","digest":"abababababababababababababababababababababababababababababababab","bytes":7},"tokenizer":"byte","vocabulary":null,"source":null,"column":"text","rows":0,"max_bytes":0,"validation":0.05},"ranges":[[1,2]],"deadline_s":10.0,"staleness":0,"codec_up":"fp32","codec_down":"fp32","budget_s":0.0,"inner_steps":null,"feedback":0.0}','5VVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVV','0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f');
INSERT INTO "orders" VALUES(1,'5BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB','{"protocol":"pilot/2","run":"run","round":1,"hotkey":"5BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB","version":"abababababababababababababababababababababababababababababababab","update":{"base":null,"steps":[{"kind":"state","codec":"fp32","digest":"abababababababababababababababababababababababababababababababab","bytes":100}],"snapshots":[]},"state_digest":null,"task":{"name":"gpt2","parameters":{"depth":2}},"data":{"tokens":{"kind":"data","digest":"abababababababababababababababababababababababababababababababab","bytes":7},"tokenizer":"byte","vocabulary":null,"source":null,"column":"text","rows":0,"max_bytes":0,"validation":0.05},"ranges":[[1,2]],"deadline_s":10.0,"staleness":0,"codec_up":"fp32","codec_down":"fp32","budget_s":0.0,"inner_steps":null,"feedback":0.0}','5VVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVV','0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f');
INSERT INTO "orders" VALUES(2,'5AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA','{"protocol":"pilot/2","run":"run","round":2,"hotkey":"5AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA","version":"abababababababababababababababababababababababababababababababab","update":{"base":null,"steps":[{"kind":"state","codec":"fp32","digest":"abababababababababababababababababababababababababababababababab","bytes":100}],"snapshots":[]},"state_digest":null,"task":{"name":"gpt2","parameters":{"depth":2}},"data":{"tokens":{"kind":"data","digest":"abababababababababababababababababababababababababababababababab","bytes":7},"tokenizer":"byte","vocabulary":null,"source":null,"column":"text","rows":0,"max_bytes":0,"validation":0.05},"ranges":[[2,3]],"deadline_s":10.0,"staleness":0,"codec_up":"fp32","codec_down":"fp32","budget_s":0.0,"inner_steps":null,"feedback":0.0}','5VVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVV','0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f');
CREATE TABLE receipts (
    round INTEGER NOT NULL REFERENCES rounds (round),
    hotkey TEXT NOT NULL,
    fault TEXT,                  -- NULL: accepted
    reason TEXT NOT NULL,
    done TEXT NOT NULL,          -- JSON: the accepted index ranges [[start, stop], …]
    work INTEGER NOT NULL,       -- examples or tokens in them, by the validator's own count
    scores TEXT NOT NULL,        -- JSON: name to number
    measures TEXT NOT NULL,      -- JSON: name to number
    weight REAL NOT NULL,        -- what it earned in this round
    body TEXT NOT NULL,
    signer TEXT NOT NULL,
    signature TEXT NOT NULL,
    settled INTEGER NOT NULL,    -- the round whose commit brought it: its order's own, or the next
    PRIMARY KEY (round, hotkey),
    FOREIGN KEY (round, hotkey) REFERENCES orders (round, hotkey)
);
INSERT INTO "receipts" VALUES(0,'5AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA',NULL,'','[[0, 1]]',512,'{"accepted": 1.0}','{}',0.5,'{"protocol":"pilot/2","run":"run","round":0,"hotkey":"5AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA","order":"abababababababababababababababababababababababababababababababab","verdict":"ACCEPTED","reason":"","done":[[0,1]],"work":512,"scores":{"accepted":1.0},"measures":{},"weight":0.5,"seconds":0.0}','5VVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVV','0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f',0);
INSERT INTO "receipts" VALUES(0,'5BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB','LATE','no reply by the deadline','[]',0,'{"accepted": 1.0}','{}',0.5,'{"protocol":"pilot/2","run":"run","round":0,"hotkey":"5BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB","order":"abababababababababababababababababababababababababababababababab","verdict":"LATE","reason":"no reply by the deadline","done":[],"work":0,"scores":{"accepted":1.0},"measures":{},"weight":0.5,"seconds":0.0}','5VVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVV','0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f',0);
INSERT INTO "receipts" VALUES(1,'5AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA',NULL,'','[[1, 2]]',512,'{"accepted": 1.0}','{}',0.5,'{"protocol":"pilot/2","run":"run","round":1,"hotkey":"5AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA","order":"abababababababababababababababababababababababababababababababab","verdict":"ACCEPTED","reason":"","done":[[1,2]],"work":512,"scores":{"accepted":1.0},"measures":{},"weight":0.5,"seconds":0.0}','5VVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVV','0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f',1);
INSERT INTO "receipts" VALUES(1,'5BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB','LATE','no reply by the deadline','[]',0,'{"accepted": 1.0}','{}',0.5,'{"protocol":"pilot/2","run":"run","round":1,"hotkey":"5BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB","order":"abababababababababababababababababababababababababababababababab","verdict":"LATE","reason":"no reply by the deadline","done":[],"work":0,"scores":{"accepted":1.0},"measures":{},"weight":0.5,"seconds":0.0}','5VVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVV','0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f',1);
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY,
    version TEXT NOT NULL,       -- of the model, after the round
    cursor TEXT NOT NULL,        -- JSON: the next index to order, and the ranges that came back
    settings TEXT NOT NULL,      -- JSON: of the optimizer's step, name to number: what a replay needs
    codec_up TEXT NOT NULL,
    codec_down TEXT NOT NULL,
    ranker TEXT NOT NULL,        -- JSON: its state
    metrics TEXT NOT NULL,       -- JSON
    committed_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);
INSERT INTO "rounds" VALUES(0,'ee4ef548074a24bdafa70ded2bb13e4e12cd440e0ee2a0cd46dadf0014dc1964','{"next": 1}','{"lr": 0.1}','ternary-rc','2bit','{}','{"round": 0, "loss": 0.1, "note": "fine"}','2026-12-01T00:00:00.000Z');
INSERT INTO "rounds" VALUES(1,'06fb8024c96663d9270ee0594ccbc6d2407c7fcbbc66d7f09ebf4ff9fa661398','{"next": 2}','{"lr": 1.1}','ternary-rc','2bit','{}','{"round": 1, "loss": 1.1, "note": "fine"}','2026-12-01T00:00:00.000Z');
CREATE TABLE weights (           -- of every known miner, ordered in this round or not
    round INTEGER NOT NULL REFERENCES rounds (round),
    hotkey TEXT NOT NULL,
    weight REAL NOT NULL,
    PRIMARY KEY (round, hotkey)
);
INSERT INTO "weights" VALUES(0,'5AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA',3.33333333333333314829e-01);
INSERT INTO "weights" VALUES(0,'5BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB',3.33333333333333314829e-01);
INSERT INTO "weights" VALUES(0,'5CCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCC',3.33333333333333314829e-01);
INSERT INTO "weights" VALUES(1,'5AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA',3.33333333333333314829e-01);
INSERT INTO "weights" VALUES(1,'5BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB',3.33333333333333314829e-01);
INSERT INTO "weights" VALUES(1,'5CCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCC',3.33333333333333314829e-01);
COMMIT;
