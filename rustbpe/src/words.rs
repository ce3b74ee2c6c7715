//! Counts of distinct words. A word of up to 15 bytes is its own key, inside the table.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

/// The longest word that is its own key.
pub const SHORT: usize = 15;

static SEEDS: LazyLock<[u64; 2]> = LazyLock::new(|| {
    let state = RandomState::new();
    [state.hash_one(1), state.hash_one(2)]
});

/// Mixes words into table positions; seeded by the process, so that no text can be made to collide.
#[derive(Clone, Copy)]
pub struct Mixer([u64; 2]);

impl Mixer {
    pub fn new() -> Self {
        Self(*SEEDS)
    }

    #[inline(always)]
    pub fn mix(self, low: u64, high: u64) -> u64 {
        let product = u128::from(low ^ self.0[0]) * u128::from(high ^ self.0[1]);
        (product as u64) ^ (product >> 64) as u64
    }

    #[inline(always)]
    pub fn key(self, key: u128) -> u64 {
        self.mix(key as u64, (key >> 64) as u64)
    }
}

/// The key of `text[start..end]`, 1 to 15 bytes: the bytes, then zeros, then the length.
#[inline(always)]
pub fn short_key(text: &[u8], start: usize, end: usize) -> u128 {
    let length = end - start;
    let bytes = match text.get(start..start + 16) {
        Some(sixteen) => {
            u128::from_le_bytes(sixteen.try_into().unwrap_or_default()) & (u128::MAX >> (128 - 8 * length))
        }
        None => {
            let mut padded = [0; 16];
            padded[..length].copy_from_slice(&text[start..end]);
            u128::from_le_bytes(padded)
        }
    };
    bytes | (length as u128) << 120
}

/// How often each word occurs.
pub struct Counts {
    mixer: Mixer,
    slots: Vec<(u128, u64)>,
    used: usize,
    long: HashMap<Box<[u8]>, u64>,
}

impl Default for Counts {
    fn default() -> Self {
        Self { mixer: Mixer::new(), slots: vec![(0, 0); 1 << 12], used: 0, long: HashMap::new() }
    }
}

impl Counts {
    /// Counts `text[start..end]`, which is not empty.
    #[inline(always)]
    pub fn add(&mut self, text: &[u8], start: usize, end: usize) {
        if end - start <= SHORT {
            self.add_key(short_key(text, start, end), 1);
        } else {
            self.add_long(&text[start..end], 1);
        }
    }

    #[cfg(test)]
    pub fn add_many(&mut self, word: &[u8], count: u64) {
        self.add_key(short_key(word, 0, word.len()), count);
    }

    #[inline(always)]
    fn add_key(&mut self, key: u128, count: u64) {
        let mask = self.slots.len() - 1;
        let mut at = self.mixer.key(key) as usize & mask;
        loop {
            let slot = &mut self.slots[at];
            if slot.0 == key {
                slot.1 += count;
                return;
            }
            if slot.0 == 0 {
                *slot = (key, count);
                self.used += 1;
                if self.used * 4 > self.slots.len() * 3 {
                    self.grow();
                }
                return;
            }
            at = (at + 1) & mask;
        }
    }

    fn add_long(&mut self, word: &[u8], count: u64) {
        match self.long.get_mut(word) {
            Some(known) => *known += count,
            None => {
                self.long.insert(word.into(), count);
            }
        }
    }

    #[cold]
    fn grow(&mut self) {
        let larger = vec![(0, 0); self.slots.len() * 2];
        let old = std::mem::replace(&mut self.slots, larger);
        self.used = 0;
        for (key, count) in old {
            if key != 0 {
                self.add_key(key, count);
            }
        }
    }

    pub fn merge(&mut self, other: Self) {
        for (key, count) in other.slots {
            if key != 0 {
                self.add_key(key, count);
            }
        }
        for (word, count) in other.long {
            self.add_long(&word, count);
        }
    }

    pub fn len(&self) -> usize {
        self.used + self.long.len()
    }

    /// Calls `each` with every word and its count, in no order.
    pub fn each(&self, mut each: impl FnMut(&[u8], u64)) {
        for &(key, count) in &self.slots {
            if key != 0 {
                each(&key.to_le_bytes()[..(key >> 120) as usize], count);
            }
        }
        for (word, &count) in &self.long {
            each(word, count);
        }
    }
}
