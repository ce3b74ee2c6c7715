"""The ledger's tables, as the steps that made them: a new ledger takes all of them, an older one those it lacks."""

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
    weight REAL NOT NULL,        -- what it earned in this round
    body TEXT NOT NULL,
    signer TEXT NOT NULL,
    signature TEXT NOT NULL,
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
"""
LATE = """
CREATE TABLE IF NOT EXISTS late (  -- work that came after its round was closed: it is not in the model
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
SETTLED = """  -- by which round's commit it came: its order's own, or the next
ALTER TABLE receipts ADD COLUMN settled INTEGER NOT NULL DEFAULT 0;
UPDATE receipts SET settled = round;
"""
STEPS: Final = (TABLES, LATE, SETTLED)  # never changed once released: add another
VERSION: Final = len(STEPS)  # PRAGMA user_version


def upgrade(version: int) -> list[str]:
    """The statements that bring a ledger of this version to the newest, for one transaction."""
    statements = "".join(STEPS[version:]).split(";\n")  # each ends a line
    return [*statements, f"PRAGMA user_version = {VERSION}"]
