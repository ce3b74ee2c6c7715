//! The tokens, and which two make which.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::words::{Mixer, SHORT, short_key};

/// The token of no bytes: an id that is not used.
const NONE: u32 = u32::MAX;

/// Ids from here on are refused: a small file must not ask for a large table.
pub const MOST_IDS: usize = 1 << 22;

/// So many bytes may be read where any token begins.
pub const PADDING: usize = 16;

/// Tokens by id and by bytes, both unique. (No two merges that were learnt make the same bytes: bytes that no merge
/// reaches across are merged alike wherever they stand.)
pub struct Vocab {
    bytes: Vec<u8>,
    /// Of each id: where its bytes start; and the end of the last.
    starts: Vec<usize>,
    pub of_byte: [u32; 256],
    short: Table<u128>,
    long: HashMap<Box<[u8]>, u32>,
    pairs: Table<u64>,
}

impl Vocab {
    /// From tokens in the order of their ids; an empty one is an id that is not used.
    pub fn new<'a>(tokens: impl Iterator<Item = &'a [u8]>) -> Result<Self> {
        let mut vocab = Self {
            bytes: Vec::new(),
            starts: vec![0],
            of_byte: [NONE; 256],
            short: Table::default(),
            long: HashMap::new(),
            pairs: Table::default(),
        };
        for (id, token) in tokens.enumerate() {
            if id >= MOST_IDS {
                return Err(Error::value(format!("more than {MOST_IDS} tokens")));
            }
            let id = id as u32;
            vocab.bytes.extend_from_slice(token);
            vocab.starts.push(vocab.bytes.len());
            if let Some(other) = vocab.id(token) {
                return Err(Error::value(format!("the ids {other} and {id} have the same bytes")));
            }
            match *token {
                [] => continue,
                [byte] => vocab.of_byte[usize::from(byte)] = id,
                _ => {}
            }
            if token.len() <= SHORT {
                vocab.short.insert(short_key(token, 0, token.len()), id);
            } else {
                vocab.long.insert(token.into(), id);
            }
        }
        if let Some(byte) = vocab.of_byte.iter().position(|&id| id == NONE) {
            return Err(Error::value(format!("the byte {byte:#04x} has no token")));
        }
        vocab.bytes.extend([0; PADDING]);
        vocab.find_pairs();
        Ok(vocab)
    }

    /// From merges: ids 0 to 255 are the bytes, each merge makes the next id.
    pub fn from_merges(merges: &[(u32, u32)]) -> Result<Self> {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for &(left, right) in merges {
            let (Some(left), Some(right)) = (tokens.get(left as usize), tokens.get(right as usize)) else {
                return Err(Error::value(format!("a merge of {left} and {right} before these are tokens")));
            };
            tokens.push([left.as_slice(), right].concat());
        }
        Self::new(tokens.iter().map(Vec::as_slice))
    }

    /// Every way in which a token is two tokens.
    fn find_pairs(&mut self) {
        for id in 0..self.starts.len() as u32 - 1 {
            for pair in self.halves(id) {
                self.pairs.insert(u64::from(pair.0) << 32 | u64::from(pair.1), id);
            }
        }
    }

    /// The pairs of tokens that are this one's bytes.
    pub fn halves(&self, id: u32) -> Vec<(u32, u32)> {
        let token = self.token(id).unwrap_or_default();
        let half = |at: usize| Some((self.id(&token[..at])?, self.id(&token[at..])?));
        (1..token.len()).filter_map(half).collect()
    }

    /// One more than the highest id.
    pub fn ids(&self) -> u32 {
        self.starts.len() as u32 - 1
    }

    pub fn token(&self, id: u32) -> Option<&[u8]> {
        let (start, end) = (*self.starts.get(id as usize)?, *self.starts.get(id as usize + 1)?);
        if start < end { Some(&self.bytes[start..end]) } else { None }
    }

    /// The bytes where a token begins, its own and others', and its length.
    #[inline(always)]
    pub fn padded(&self, id: u32) -> Option<(&[u8], usize)> {
        let (start, end) = (*self.starts.get(id as usize)?, *self.starts.get(id as usize + 1)?);
        if start < end { Some((self.bytes.get(start..start + PADDING)?, end - start)) } else { None }
    }

    /// Ids with their bytes.
    pub fn tokens(&self) -> impl Iterator<Item = (u32, &[u8])> {
        (0..self.ids()).filter_map(|id| Some((id, self.token(id)?)))
    }

    pub fn id(&self, token: &[u8]) -> Option<u32> {
        match token.len() {
            0 => None,
            1..=SHORT => self.short.get(short_key(token, 0, token.len())),
            _ => self.long.get(token).copied(),
        }
    }

    #[inline(always)]
    pub fn short_id(&self, key: u128) -> Option<u32> {
        self.short.get(key)
    }

    /// The token that two tokens make; `u32::MAX` if none.
    #[inline(always)]
    pub fn pair(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(u64::from(left) << 32 | u64::from(right)).unwrap_or(NONE)
    }
}

trait Key: Copy + Eq {
    fn mixed(self, mixer: Mixer) -> u64;
}

impl Key for u128 {
    fn mixed(self, mixer: Mixer) -> u64 {
        mixer.key(self)
    }
}

impl Key for u64 {
    fn mixed(self, mixer: Mixer) -> u64 {
        mixer.mix(self, 0)
    }
}

/// An open-addressing table, at most half full. A slot of `NONE` is empty.
struct Table<K> {
    mixer: Mixer,
    slots: Vec<(K, u32)>,
    used: usize,
}

impl<K: Key + Default> Default for Table<K> {
    fn default() -> Self {
        Self { mixer: Mixer::new(), slots: vec![(K::default(), NONE); 1 << 10], used: 0 }
    }
}

impl<K: Key + Default> Table<K> {
    #[inline(always)]
    fn slot(&self, key: K) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = key.mixed(self.mixer) as usize & mask;
        while self.slots[at].1 != NONE && self.slots[at].0 != key {
            at = (at + 1) & mask;
        }
        at
    }

    #[inline(always)]
    fn get(&self, key: K) -> Option<u32> {
        let id = self.slots[self.slot(key)].1;
        if id == NONE { None } else { Some(id) }
    }

    fn insert(&mut self, key: K, id: u32) {
        if self.used * 2 >= self.slots.len() {
            let larger = vec![(K::default(), NONE); self.slots.len() * 2];
            for (key, id) in std::mem::replace(&mut self.slots, larger) {
                if id != NONE {
                    let at = self.slot(key);
                    self.slots[at] = (key, id);
                }
            }
        }
        let at = self.slot(key);
        self.used += usize::from(self.slots[at].1 == NONE);
        self.slots[at] = (key, id);
    }
}
