//! Training and encoding do what the slow and obvious way does.

mod common;

use std::collections::HashMap;

use common::Random;
use rustbpe::bpe::{Bpe, Specials};
use rustbpe::error::Error;
use rustbpe::split::{DEFAULT_PATTERN, Splitter};
use rustbpe::train::Trainer;

fn splitter() -> Splitter {
    Splitter::new(DEFAULT_PATTERN).unwrap()
}

fn learn(texts: &[&str], wanted: usize, threads: usize) -> Vec<(u32, u32)> {
    let mut trainer = Trainer::new(&splitter(), threads);
    texts.chunks(3).for_each(|some| trainer.feed(some, &mut |_| Ok(())).unwrap());
    trainer.merges(wanted, &mut |_| Ok(())).unwrap()
}

/// Counts all pairs anew for each merge.
fn learn_slowly(texts: &[&str], wanted: usize) -> Vec<(u32, u32)> {
    let mut words: Vec<Vec<u32>> = Vec::new();
    for text in texts {
        splitter().split(text, |start, end| words.push(text[start..end].bytes().map(u32::from).collect())).unwrap();
    }
    let mut merges = Vec::new();
    while merges.len() < wanted {
        let mut counts = HashMap::<(u32, u32), i64>::new();
        words.iter().flat_map(|word| word.windows(2)).for_each(|two| *counts.entry((two[0], two[1])).or_default() += 1);
        let Some((pair, _)) = counts.into_iter().min_by_key(|&(pair, count)| (-count, pair)) else { break };
        let new = 256 + merges.len() as u32;
        merges.push(pair);
        for word in &mut words {
            let mut at = 0;
            while at + 1 < word.len() {
                if (word[at], word[at + 1]) == pair {
                    word[at] = new;
                    word.remove(at + 1);
                }
                at += 1;
            }
        }
    }
    merges
}

/// tiktoken's rule on one chunk: the two neighbours whose bytes are the lowest token, the leftmost of equals.
fn encode_slowly(bpe: &Bpe, chunk: &[u8]) -> Vec<u32> {
    if let Some(id) = bpe.vocab().id(chunk) {
        return vec![id];
    }
    let mut parts: Vec<&[u8]> = Vec::new();
    let mut ends: Vec<usize> = (0..=chunk.len()).collect();
    loop {
        let made = |at: usize| bpe.vocab().id(&chunk[ends[at]..ends[at + 2]]).map(|id| (id, at));
        match (0..ends.len().saturating_sub(2)).filter_map(made).min() {
            Some((_, at)) => drop(ends.remove(at + 1)),
            None => break,
        }
    }
    parts.extend(ends.windows(2).map(|two| &chunk[two[0]..two[1]]));
    parts.into_iter().map(|part| bpe.vocab().id(part).unwrap()).collect()
}

#[test]
fn merges_are_the_slow_ways_on_any_number_of_threads() {
    let mut random = Random(1);
    for round in 0..150 {
        let alphabet: Vec<char> = "aab bcé\n1".chars().take(2 + random.below(7)).collect();
        let texts: Vec<String> = (0..8)
            .map(|_| {
                let n = random.below(60);
                random.text(&alphabet, n)
            })
            .collect();
        let mut texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        texts.push("aaaaaaaaaaaaaaaaa aaaa abababab");
        let slow = learn_slowly(&texts, 60);
        for threads in [1, 2, 5] {
            assert_eq!(learn(&texts, 60, threads), slow, "round {round}, {threads} threads, {texts:?}");
        }
    }
}

#[test]
fn chunks_of_any_length_encode_as_the_slow_way_does() {
    let mut random = Random(2);
    for round in 0..60 {
        let alphabet: Vec<char> = "abcdéf".chars().take(1 + random.below(6)).collect();
        let text = random.text(&alphabet, 2000);
        let merges = learn(&[&text[..], "aaaa aaa aa"], 1 + random.below(200), 1);
        let bpe = Bpe::from_merges(splitter(), &merges, &[]).unwrap();
        for length in (1..24).chain([95, 96, 97, 98, 300, 1000]) {
            let chunk = random.text(&alphabet, length);
            let ids = bpe.encode(&chunk, &Specials::default()).unwrap();
            assert_eq!(ids, encode_slowly(&bpe, chunk.as_bytes()), "round {round}, {chunk:?}");
            assert_eq!(bpe.encode(&chunk, &Specials::default()).unwrap(), ids, "remembered otherwise");
            assert_eq!(bpe.decode(&ids).unwrap(), chunk.as_bytes());
        }
    }
}

#[test]
fn a_watch_that_says_stop_stops() {
    let text: String = (0..60_000).map(|number| format!("w{number:x} ")).collect();
    let mut trainer = Trainer::new(&splitter(), 2);
    trainer.feed(&[&text], &mut |_| Ok(())).unwrap();
    let stopped = trainer.merges(usize::MAX >> 20, &mut |_| Err(Error::Stopped));
    assert!(matches!(stopped, Err(Error::Stopped)));
}

#[test]
fn nothing_to_learn_from() {
    let trainer = Trainer::new(&splitter(), 2);
    assert!(trainer.merges(10, &mut |_| Ok(())).unwrap_err().to_string().contains("no text"));
    assert_eq!(learn(&["a b c"], 10, 1), [(32, 98), (32, 99)]);
}
