//! A chunk's bytes into tokens, as tiktoken does it: the whole chunk if it is a token, else the pair whose token has the
//! lowest id again and again, the leftmost of equals.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::mem;

use crate::vocab::Vocab;
use crate::words::{Mixer, SHORT, short_key};

const NONE: u32 = u32::MAX;
/// Chunks above this many bytes are merged by a queue: a scan for each merge would take quadratic time.
const LONG: usize = 96;
/// Chunks that a worker remembers: 32 bytes each.
const REMEMBERED: usize = 1 << 16;

/// A short chunk and its tokens, if these are one to three.
#[derive(Clone, Copy, Default)]
struct Known {
    key: u128,
    count: u32,
    ids: [u32; 3],
}

/// What one worker keeps between chunks. Each chunk has one place in `known`, so it never grows and never degrades.
pub struct Scratch {
    mixer: Mixer,
    known: Vec<Known>,
    /// The tokens of a chunk so far; with each the token that it makes with the next.
    parts: Vec<(u32, u32)>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self { mixer: Mixer::new(), known: vec![Known::default(); REMEMBERED], parts: Vec::new() }
    }
}

/// Appends the tokens of `text[start..end]`, which is not empty.
#[inline(always)]
pub fn encode_chunk(vocab: &Vocab, text: &[u8], start: usize, end: usize, scratch: &mut Scratch, out: &mut Vec<u32>) {
    if end - start > SHORT {
        let chunk = &text[start..end];
        match vocab.id(chunk) {
            Some(id) => out.push(id),
            None if chunk.len() > LONG => merge_long(vocab, chunk, out),
            None => merge_short(vocab, chunk, &mut scratch.parts, out),
        }
        return;
    }
    let key = short_key(text, start, end);
    let place = (scratch.mixer.key(key) >> 32) as usize % REMEMBERED;
    let known = &scratch.known[place];
    if known.key == key {
        if known.count == 1 {
            out.push(known.ids[0]);
        } else {
            out.extend_from_slice(&known.ids[..known.count as usize]);
        }
        return;
    }
    encode_new(vocab, &text[start..end], key, place, scratch, out);
}

#[inline(never)]
fn encode_new(vocab: &Vocab, chunk: &[u8], key: u128, place: usize, scratch: &mut Scratch, out: &mut Vec<u32>) {
    let before = out.len();
    match vocab.short_id(key) {
        Some(id) => out.push(id),
        None => merge_short(vocab, chunk, &mut scratch.parts, out),
    }
    let made = &out[before..];
    let mut ids = [0; 3];
    if let Some(first) = ids.get_mut(..made.len()) {
        first.copy_from_slice(made);
        scratch.known[place] = Known { key, count: made.len() as u32, ids };
    }
}

fn merge_short(vocab: &Vocab, chunk: &[u8], parts: &mut Vec<(u32, u32)>, out: &mut Vec<u32>) {
    let id = |at: usize| vocab.of_byte[usize::from(chunk[at])];
    parts.clear();
    parts.extend((1..chunk.len()).map(|at| (id(at - 1), vocab.pair(id(at - 1), id(at)))));
    parts.push((id(chunk.len() - 1), NONE));
    loop {
        let (mut at, mut made) = (0, NONE);
        for (place, part) in parts.iter().enumerate() {
            if part.1 < made {
                (at, made) = (place, part.1);
            }
        }
        if made == NONE {
            break;
        }
        parts.remove(at + 1);
        let next = parts.get(at + 1).map_or(NONE, |part| vocab.pair(made, part.0));
        parts[at] = (made, next);
        if at > 0 {
            parts[at - 1].1 = vocab.pair(parts[at - 1].0, made);
        }
    }
    out.extend(parts.iter().map(|part| part.0));
}

/// A token of a long chunk in a list of its neighbours.
#[derive(Clone, Copy)]
struct Node {
    id: u32,
    /// The token that it makes with the next.
    made: u32,
    previous: u32,
    next: u32,
}

/// Pairs to merge as (token made, place), smallest first. Pairs arrive almost in that order, so sorted lists,
/// with a heap for the late ones, take a fraction of a heap's time.
#[derive(Default)]
struct Queue {
    sorted: Vec<u64>,
    at: usize,
    /// Pushed since `sorted` was, below its last.
    late: BinaryHeap<Reverse<u64>>,
    /// Pushed since, not below its last.
    later: Vec<u64>,
}

impl Queue {
    fn push(&mut self, made: u32, place: u32) {
        let entry = u64::from(made) << 32 | u64::from(place);
        if self.sorted.last().is_some_and(|&last| entry < last) {
            self.late.push(Reverse(entry));
        } else {
            self.later.push(entry);
        }
    }

    fn pop(&mut self) -> Option<(u32, u32)> {
        if self.at == self.sorted.len() && self.late.is_empty() {
            self.sorted.clear();
            mem::swap(&mut self.sorted, &mut self.later);
            self.sorted.sort_unstable();
            self.at = 0;
        }
        let entry = match (self.sorted.get(self.at), self.late.peek()) {
            (Some(&entry), Some(late)) if entry < late.0 => entry,
            (_, Some(_)) => return self.late.pop().map(|late| split(late.0)),
            (Some(&entry), None) => entry,
            (None, None) => return None,
        };
        self.at += 1;
        Some(split(entry))
    }
}

fn split(entry: u64) -> (u32, u32) {
    ((entry >> 32) as u32, entry as u32)
}

/// The same by a queue: n log n.
fn merge_long(vocab: &Vocab, chunk: &[u8], out: &mut Vec<u32>) {
    let last = chunk.len() - 1;
    let mut nodes: Vec<Node> = Vec::with_capacity(chunk.len());
    for (at, &byte) in chunk.iter().enumerate() {
        let id = vocab.of_byte[usize::from(byte)];
        let made = if at < last { vocab.pair(id, vocab.of_byte[usize::from(chunk[at + 1])]) } else { NONE };
        let next = if at < last { at as u32 + 1 } else { NONE };
        nodes.push(Node { id, made, previous: (at as u32).wrapping_sub(1), next });
    }
    let mut queue = Queue::default();
    nodes.iter().zip(0..).filter(|(node, _)| node.made != NONE).for_each(|(node, at)| queue.push(node.made, at));
    while let Some((made, at)) = queue.pop() {
        let node = nodes[at as usize];
        if node.made != made {
            continue; // one of the two is part of another token by now
        }
        let gone = nodes[node.next as usize];
        nodes[node.next as usize].made = NONE;
        let mut made_next = NONE;
        if let Some(after) = nodes.get_mut(gone.next as usize) {
            after.previous = at;
            made_next = vocab.pair(made, after.id);
        }
        nodes[at as usize] = Node { id: made, made: made_next, previous: node.previous, next: gone.next };
        if made_next != NONE {
            queue.push(made_next, at);
        }
        if let Some(before) = nodes.get_mut(node.previous as usize) {
            before.made = vocab.pair(before.id, made);
            if before.made != NONE {
                queue.push(before.made, node.previous);
            }
        }
    }
    let mut at = 0;
    while let Some(node) = nodes.get(at as usize) {
        out.push(node.id);
        at = node.next;
    }
}
