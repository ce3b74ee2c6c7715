//! Training: count the distinct words of the text, then merge the most frequent pair again and again.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::error::{Error, Result};
use crate::parallel::{self, LOOK};
use crate::split::Splitter;
use crate::words::{Counts, Mixer};

/// Long texts are counted in parts of about this many bytes, so that all threads have work.
const PART: usize = 1 << 18;

/// Called now and then with the merges done; an error stops the training.
pub type Watch<'w> = &'w mut dyn FnMut(usize) -> Result<()>;

/// Collects the words of texts, then learns the merges. Holds the distinct words, never the texts.
pub struct Trainer {
    splitters: Vec<Splitter>,
    counts: Vec<Counts>,
}

impl Trainer {
    pub fn new(splitter: &Splitter, threads: usize) -> Self {
        let threads = threads.max(1);
        Self { splitters: vec![splitter.clone(); threads], counts: (0..threads).map(|_| Counts::default()).collect() }
    }

    /// Counts the words of some more texts.
    pub fn feed(&mut self, texts: &[&str], watch: Watch) -> Result<()> {
        let splitter = &self.splitters[0];
        let parts: Vec<&str> = texts.iter().flat_map(|text| splitter.parts(text, PART)).collect();
        let next = AtomicUsize::new(0);
        let states = self.splitters.iter().zip(&mut self.counts).collect();
        let work = |(splitter, counts): (&Splitter, &mut Counts), stop: &std::sync::atomic::AtomicBool| {
            while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                splitter.split(part, |start, end| counts.add(part.as_bytes(), start, end))?;
            }
            Ok(())
        };
        parallel::run(states, work, &mut || watch(0))
    }

    /// The merges, at most `wanted`, as (left, right) ids in the order of the ids 256, 257, … that they make. Fewer where
    /// no pair is left. The most frequent pair is next; of equals the one with the lowest (left, right).
    pub fn merges(mut self, wanted: usize, watch: Watch) -> Result<Vec<(u32, u32)>> {
        let mut counts = self.counts.pop().unwrap_or_default();
        for other in self.counts {
            counts.merge(other);
        }
        if counts.len() == 0 {
            return Err(Error::value("there is no text to train on"));
        }
        let mut table = Words::new(counts)?.pairs(wanted);
        let mut merges = Vec::new();
        let mut looked = Instant::now();
        while merges.len() < wanted {
            let Some(pair) = table.most_frequent() else { break };
            table.merge(pair, 256 + merges.len() as u32);
            merges.push((pair.left, pair.right));
            if merges.len() % 32 == 0 && looked.elapsed() > LOOK {
                watch(merges.len())?;
                looked = Instant::now();
            }
        }
        watch(merges.len())?;
        Ok(merges)
    }
}

/// Each word in one arena: its length in symbols, its count (low, high half), its symbols.
struct Words(Vec<u32>);

const HEADER: usize = 3;

impl Words {
    fn new(counts: Counts) -> Result<Self> {
        let mut size = 0;
        counts.each(|word, _| size += if word.len() > 1 { HEADER + word.len() } else { 0 });
        if size > u32::MAX as usize {
            return Err(Error::value(format!("the distinct words are too many: {size} symbols, at most {}", u32::MAX)));
        }
        let mut arena = Vec::with_capacity(size);
        counts.each(|word, count| {
            if word.len() > 1 {
                arena.extend([word.len() as u32, count as u32, (count >> 32) as u32]);
                arena.extend(word.iter().map(|&byte| u32::from(byte)));
            }
        });
        Ok(Self(arena))
    }

    fn count(&self, at: usize) -> u64 {
        u64::from(self.0[at + 1]) | u64::from(self.0[at + 2]) << 32
    }

    /// The table of the pairs of bytes. There can be no more tokens than 256 + `wanted`, nor than symbols.
    fn pairs(self, wanted: usize) -> Pairs {
        let pair_of = |pair: &[u32]| (pair[0] << 8 | pair[1]) as usize;
        let mut sums = vec![(0_u64, 0_u32); 1 << 16]; // of counts, of words
        let mut last = vec![u32::MAX; 1 << 16];
        let mut at = 0;
        let mut total = 0;
        let each_pair = |at: usize| self.0[at + HEADER..at + HEADER + self.0[at] as usize].windows(2).map(pair_of);
        while at < self.0.len() {
            let count = self.count(at);
            for pair in each_pair(at) {
                sums[pair].0 += count;
                if last[pair] != at as u32 {
                    last[pair] = at as u32;
                    sums[pair].1 += 1;
                    total += 1;
                }
            }
            at += HEADER + self.0[at] as usize;
        }
        let mut slots = Slots::default();
        let mut found_in = vec![0; total];
        let mut cursors = vec![0; 1 << 16];
        let mut start = 0;
        for (pair, &(count, words)) in sums.iter().enumerate() {
            cursors[pair] = start;
            if words > 0 {
                let key = Pair { left: pair as u32 >> 8, right: pair as u32 & 0xff }.key();
                slots.insert(Slot { key, count, start, words });
            }
            start += words as usize;
        }
        last.fill(u32::MAX);
        at = 0;
        while at < self.0.len() {
            for pair in each_pair(at) {
                if last[pair] != at as u32 {
                    last[pair] = at as u32;
                    found_in[cursors[pair]] = at as u32;
                    cursors[pair] += 1;
                }
            }
            at += HEADER + self.0[at] as usize;
        }
        let most = sums.iter().map(|sum| sum.0).max().unwrap_or_default();
        let tokens = 256 + wanted.min(self.0.len());
        Pairs {
            words: self,
            slots,
            found_in,
            queue: BinaryHeap::new(),
            floor: most + 1,
            lefts: Neighbours::new(tokens),
            rights: Neighbours::new(tokens),
        }
    }
}

#[derive(Clone, Copy)]
struct Pair {
    left: u32,
    right: u32,
}

impl Pair {
    fn key(self) -> u64 {
        u64::from(self.left) << 32 | u64::from(self.right)
    }
}

/// A pair: how often it occurs, and in which words: `found_in[start..start + words]`. That list is complete when the pair
/// first occurs, because the later of its two tokens is new then; some of its words may have lost the pair since.
#[derive(Clone, Copy, Default)]
struct Slot {
    key: u64,
    count: u64,
    start: usize,
    words: u32,
}

/// An open-addressing table. A slot without words is empty.
struct Slots {
    mixer: Mixer,
    slots: Vec<Slot>,
    used: usize,
}

impl Default for Slots {
    fn default() -> Self {
        Self { mixer: Mixer::new(), slots: vec![Slot::default(); 1 << 16], used: 0 }
    }
}

impl Slots {
    fn find(&mut self, key: u64) -> &mut Slot {
        let mask = self.slots.len() - 1;
        let mut at = self.mixer.mix(key, 0) as usize & mask;
        while self.slots[at].words != 0 && self.slots[at].key != key {
            at = (at + 1) & mask;
        }
        &mut self.slots[at]
    }

    fn insert(&mut self, slot: Slot) {
        if self.used * 3 > self.slots.len() * 2 {
            let larger = vec![Slot::default(); self.slots.len() * 2];
            for old in std::mem::replace(&mut self.slots, larger) {
                if old.words != 0 {
                    *self.find(old.key) = old;
                }
            }
        }
        self.used += 1;
        *self.find(slot.key) = slot;
    }
}

struct Pairs {
    words: Words,
    slots: Slots,
    found_in: Vec<u32>,
    /// Pairs that occur at least `floor` times, with a count that was right once and can only have fallen.
    queue: BinaryHeap<(u64, Reverse<u64>)>,
    floor: u64,
    lefts: Neighbours,
    rights: Neighbours,
}

impl Pairs {
    fn most_frequent(&mut self) -> Option<Pair> {
        loop {
            while let Some((count, Reverse(key))) = self.queue.pop() {
                let now = self.slots.find(key).count;
                if now == count {
                    return Some(Pair { left: (key >> 32) as u32, right: key as u32 });
                }
                if now >= self.floor {
                    self.queue.push((now, Reverse(key)));
                }
            }
            if self.floor == 1 {
                return None;
            }
            self.floor = (self.floor / 4).max(1);
            let frequent = self.slots.slots.iter().filter(|slot| slot.count >= self.floor);
            self.queue = frequent.map(|slot| (slot.count, Reverse(slot.key))).collect();
        }
    }

    /// Makes every occurrence of the pair the token `new`.
    fn merge(&mut self, pair: Pair, new: u32) {
        let slot = self.slots.find(pair.key());
        let places = slot.start..slot.start + slot.words as usize;
        slot.count = 0;
        let mut twins = Slot::default(); // new followed by new
        let mut twin_words = Vec::new();
        for place in places {
            let word = self.found_in[place];
            let at = word as usize;
            let count = self.words.count(at);
            let length = self.words.0[at] as usize;
            let symbols = &mut self.words.0[at + HEADER..at + HEADER + length];
            let Some(first) = symbols.windows(2).position(|two| two == [pair.left, pair.right]) else { continue };
            let (mut read, mut write, mut joined) = (first, first, false);
            while read < length {
                if read + 1 == length || symbols[read] != pair.left || symbols[read + 1] != pair.right {
                    symbols[write] = symbols[read];
                    (read, write) = (read + 1, write + 1);
                    continue;
                }
                if !joined && write > 0 {
                    self.lefts.note(symbols[write - 1], count, word);
                }
                symbols[write] = new;
                (read, write) = (read + 2, write + 1);
                joined = symbols[..length].get(read..read + 2) == Some(&[pair.left, pair.right]);
                if joined {
                    twins.count += count;
                    if twin_words.last() != Some(&word) {
                        twin_words.push(word);
                    }
                } else if read < length {
                    self.rights.note(symbols[read], count, word);
                }
            }
            self.words.0[at] = write as u32;
        }
        for side in [Side::Left, Side::Right] {
            let neighbours = if side == Side::Left { &mut self.lefts } else { &mut self.rights };
            for (token, slot) in neighbours.settle(&mut self.found_in) {
                let (before, after) = match side {
                    Side::Left => ((token, pair.left), (token, new)),
                    Side::Right => ((pair.right, token), (new, token)),
                };
                self.fall(before, pair, slot.count);
                self.add(after, slot);
            }
        }
        if twins.count > 0 {
            twins.start = self.found_in.len();
            twins.words = twin_words.len() as u32;
            self.found_in.append(&mut twin_words);
            self.fall((pair.right, pair.left), pair, twins.count);
            self.add((new, new), twins);
        }
    }

    /// A pair lost occurrences to the merge of `merged`, which has none left itself.
    fn fall(&mut self, (left, right): (u32, u32), merged: Pair, count: u64) {
        if (left, right) != (merged.left, merged.right) {
            let slot = self.slots.find(Pair { left, right }.key());
            slot.count = slot.count.saturating_sub(count);
        }
    }

    /// A pair occurs for the first time.
    fn add(&mut self, (left, right): (u32, u32), slot: Slot) {
        let key = Pair { left, right }.key();
        self.slots.insert(Slot { key, ..slot });
        if slot.count >= self.floor {
            self.queue.push((slot.count, Reverse(key)));
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Left,
    Right,
}

/// The tokens on one side of what a merge makes: how often each, and in which words.
struct Neighbours {
    of_token: Vec<Neighbour>,
    touched: Vec<u32>,
    /// (token, word) as they were found
    found: Vec<(u32, u32)>,
}

#[derive(Clone, Copy)]
struct Neighbour {
    count: u64,
    words: u32,
    last_word: u32,
    cursor: usize,
}

const NO_NEIGHBOUR: Neighbour = Neighbour { count: 0, words: 0, last_word: u32::MAX, cursor: 0 };

impl Neighbours {
    fn new(tokens: usize) -> Self {
        Self { of_token: vec![NO_NEIGHBOUR; tokens], touched: Vec::new(), found: Vec::new() }
    }

    fn note(&mut self, token: u32, count: u64, word: u32) {
        let neighbour = &mut self.of_token[token as usize];
        if neighbour.words == 0 {
            self.touched.push(token);
        }
        neighbour.count += count;
        if neighbour.last_word != word {
            neighbour.last_word = word;
            neighbour.words += 1;
            self.found.push((token, word));
        }
    }

    /// Appends the words of each token to `found_in`; gives the tokens with what a pair's slot holds, and forgets them.
    fn settle(&mut self, found_in: &mut Vec<u32>) -> Vec<(u32, Slot)> {
        let mut start = found_in.len();
        found_in.resize(start + self.found.len(), 0);
        for &token in &self.touched {
            let neighbour = &mut self.of_token[token as usize];
            neighbour.cursor = start;
            start += neighbour.words as usize;
        }
        for (token, word) in self.found.drain(..) {
            let cursor = &mut self.of_token[token as usize].cursor;
            found_in[*cursor] = word;
            *cursor += 1;
        }
        let slot = |token: u32| {
            let Neighbour { count, words, cursor, .. } =
                std::mem::replace(&mut self.of_token[token as usize], NO_NEIGHBOUR);
            (token, Slot { key: 0, count, start: cursor - words as usize, words })
        };
        self.touched.drain(..).map(slot).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::DEFAULT_PATTERN;

    #[test]
    fn counts_go_beyond_32_bits() {
        let mut trainer = Trainer::new(&Splitter::new(DEFAULT_PATTERN).unwrap(), 1);
        for (word, count) in [("ab", 3 << 32), ("cd", (3 << 32) + 1), ("ef", u32::MAX.into()), ("gab", 1), ("cdx", 1)] {
            trainer.counts[0].add_many(word.as_bytes(), count);
        }
        let merges = trainer.merges(3, &mut |_| Ok(())).unwrap();
        assert_eq!(merges, [(99, 100), (97, 98), (101, 102)]);
    }
}
