//! The hand-made splitters cut as the regex engine does.

mod common;

use common::Random;
use rustbpe::split::{CL100K_PATTERN, DEFAULT_PATTERN, GPT2_PATTERN, NANOCHAT_PATTERN, R50K_PATTERN, Splitter};

const PATTERNS: [&str; 5] = [DEFAULT_PATTERN, NANOCHAT_PATTERN, CL100K_PATTERN, GPT2_PATTERN, R50K_PATTERN];

/// Apostrophes and what follows them in any case (ſ folds to s, K to k), blanks of all kinds, digits and other numbers,
/// letters of one to four bytes, marks, emoji and their joiners.
const TRICKY: &str = "'’sStTlLvVeErRdDmMkſKʼ \t\r\n\u{b}\u{85}\u{a0}\u{2003}\u{2028}\u{3000}019²½٣Ⅷ.!-_aßéÉж中𐐀e\u{301}\u{200d}\u{fe0f}😀👩\0\u{10ffff}";

fn chunks(splitter: &Splitter, text: &str) -> Vec<String> {
    let mut chunks = Vec::new();
    splitter.split(text, |start, end| chunks.push(text[start..end].to_owned())).expect(text);
    chunks
}

fn pairs() -> Vec<(Splitter, Splitter)> {
    PATTERNS.map(|pattern| (Splitter::new(pattern).unwrap(), Splitter::by_engine(pattern).unwrap())).to_vec()
}

fn check(pairs: &[(Splitter, Splitter)], text: &str) {
    for (ours, engine) in pairs {
        let made = chunks(ours, text);
        assert_eq!(made, chunks(engine, text), "{text:?} under {}", ours.pattern());
        assert_eq!(made.concat(), text);
    }
}

#[test]
fn every_short_text_of_tricky_characters() {
    let (pairs, alphabet) = (pairs(), TRICKY.chars().collect::<Vec<_>>());
    for a in &alphabet {
        for b in &alphabet {
            check(&pairs, &String::from_iter([a, b]));
            for c in &alphabet {
                check(&pairs, &String::from_iter([a, b, c]));
            }
        }
    }
    let few: Vec<char> = "'sS l\r\n\u{a0}1²a.é".chars().collect();
    for number in 0..few.len().pow(5) {
        check(&pairs, &(0..5).map(|place| few[number / few.len().pow(place) % few.len()]).collect::<String>());
    }
}

#[test]
fn long_random_texts() {
    let (pairs, mut random) = (pairs(), Random(7));
    let alphabet: Vec<char> = TRICKY.chars().collect();
    for _ in 0..300 {
        let length = random.below(400);
        let some = 2 + random.below(alphabet.len() - 2);
        let first = random.below(alphabet.len() - some);
        check(&pairs, &random.text(&alphabet[first..first + some], length));
    }
}

#[test]
fn every_character_there_is() {
    let (pairs, all) = (pairs(), ('\0'..=char::MAX).collect::<Vec<_>>());
    for some in all.chunks(4096) {
        check(
            &pairs,
            &some.iter().flat_map(|&c| [c, 'a', c, c, ' ', c, '.', c, '1', c, '\n', c, ' ']).collect::<String>(),
        );
    }
}

#[test]
fn parts_have_the_chunks_of_the_whole() {
    let (mut random, alphabet) = (Random(3), "ab. \n\n\n\r'1é\u{a0}".chars().collect::<Vec<_>>());
    let mut cuts = 0;
    for pattern in PATTERNS {
        let splitter = Splitter::new(pattern).unwrap();
        for _ in 0..3000 {
            let (length, size) = (random.below(80), 1 + random.below(9));
            let text = random.text(&alphabet, length);
            let parts = splitter.parts(&text, size);
            cuts += parts.len() - 1;
            let of_parts: Vec<String> = parts.iter().flat_map(|part| chunks(&splitter, part)).collect();
            assert_eq!(of_parts, chunks(&splitter, &text), "{text:?} in {parts:?} under {pattern}");
        }
    }
    assert!(cuts > 1000, "only {cuts} cuts tried");
}

#[test]
fn a_pattern_that_is_broken_or_gives_up_or_leaves_text_out() {
    let fault = |pattern: &str, text: &str| match Splitter::new(pattern) {
        Ok(splitter) => splitter.split(text, |_, _| ()).unwrap_err().to_string(),
        Err(error) => error.to_string(),
    };
    for (pattern, text, wanted) in [
        ("(", "", "is broken"),
        (r"(?=(a|aa)+$)b\1|c", &"a".repeat(60), "gives up"),
        (r"\w+", "one two", "leaves text out at byte 3"),
        (r"\w*", "one two", "leaves text out at byte 3"),
        (r"\w+", "one ", "leaves text out at byte 3"),
    ] {
        let line = fault(pattern, text);
        assert!(line.contains(wanted) && line.contains(&format!("{pattern:?}")) && !line.contains('\n'), "{line}");
    }
}
