"""Define the ledger's tables. A ledger of another version is refused: no release reads another's runs."""

from __future__ import annotations

from typing import Final

TABLES = """
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
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
CREATE TABLE orders (            -- of committed rounds and of the open one
    round INTEGER NOT NULL,
    hotkey TEXT NOT NULL,
    body TEXT NOT NULL,
    signer TEXT NOT NULL,
    signature TEXT NOT NULL,
    PRIMARY KEY (round, hotkey)
);
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
CREATE TABLE weights (           -- of every known miner, ordered in this round or not
    round INTEGER NOT NULL REFERENCES rounds (round),
    hotkey TEXT NOT NULL,
    weight REAL NOT NULL,
    PRIMARY KEY (round, hotkey)
);
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
"""
VERSION: Final = 4  # PRAGMA user_version
RELEASES: Final = {
    1: "0.1 (protocol pilot/1)",
    2: "0.1 (protocol pilot/1)",
    3: "0.1 (protocol pilot/1)",
}  # what made them
