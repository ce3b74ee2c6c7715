//! Texts into chunks, which no merge crosses: by hand for the patterns that everybody uses, else by a regex engine.

use fancy_regex::Regex;

use crate::error::{Error, Result};
use crate::unicode::{Classes, LETTER, NEWLINE, NUMBER, OTHER, SPACE};

/// GPT-4's, as the published rustbpe has it: a chunk that ends a text in blanks is split like any other.
pub const DEFAULT_PATTERN: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
/// The same with at most two digits a chunk, which suits small vocabularies.
pub const NANOCHAT_PATTERN: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
pub const CL100K_PATTERN: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
pub const GPT2_PATTERN: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// GPT-2's as tiktoken writes it: the same chunks.
pub const R50K_PATTERN: &str = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s";

#[derive(Clone)]
enum Way {
    /// `digits` at most in a chunk; `tail`: blanks that end the text are one chunk.
    Gpt4 {
        digits: usize,
        tail: bool,
    },
    Gpt2,
    Regex(Box<Regex>),
}

/// Cuts texts as its pattern says. Workers take a clone each: a regex engine's scratch space is not shared well.
#[derive(Clone)]
pub struct Splitter {
    pattern: String,
    way: Way,
}

impl Splitter {
    pub fn new(pattern: &str) -> Result<Self> {
        let way = match pattern {
            DEFAULT_PATTERN => Way::Gpt4 { digits: 3, tail: false },
            NANOCHAT_PATTERN => Way::Gpt4 { digits: 2, tail: false },
            CL100K_PATTERN => Way::Gpt4 { digits: 3, tail: true },
            GPT2_PATTERN | R50K_PATTERN => Way::Gpt2,
            _ => Self::engine(pattern)?,
        };
        Ok(Self { pattern: pattern.to_owned(), way })
    }

    /// Whatever the pattern, by the regex engine: what the hand-made ways are measured against.
    pub fn by_engine(pattern: &str) -> Result<Self> {
        Ok(Self { pattern: pattern.to_owned(), way: Self::engine(pattern)? })
    }

    fn engine(pattern: &str) -> Result<Way> {
        match Regex::new(pattern) {
            Ok(regex) => Ok(Way::Regex(Box::new(regex))),
            Err(error) => {
                let cause = error.to_string();
                let cause = cause.lines().last().unwrap_or_default().trim();
                Err(Error::value(format!("the pattern {pattern:?} is broken: {cause}")))
            }
        }
    }

    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Calls `each` with the start and end of every chunk in turn; together they are the whole text.
    ///
    /// Errors: a pattern that gives up (catastrophic backtracking) or that leaves text out.
    #[inline]
    pub fn split(&self, text: &str, mut each: impl FnMut(usize, usize)) -> Result<()> {
        let (bytes, classes) = (text.as_bytes(), Classes::get());
        let mut at = 0;
        match &self.way {
            Way::Gpt4 { digits, tail } => {
                while at < bytes.len() {
                    let end = gpt4(classes, bytes, at, *digits, *tail);
                    each(at, end);
                    at = end;
                }
            }
            Way::Gpt2 => {
                while at < bytes.len() {
                    let end = gpt2(classes, bytes, at);
                    each(at, end);
                    at = end;
                }
            }
            Way::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let found = found.map_err(|error| self.fault(text, at, &format!("gives up ({error})")))?;
                    if found.start() != at {
                        return Err(self.fault(text, at, "leaves text out"));
                    }
                    if found.end() > at {
                        each(at, found.end());
                        at = found.end();
                    }
                }
                if at < bytes.len() {
                    return Err(self.fault(text, at, "leaves text out"));
                }
            }
        }
        Ok(())
    }

    fn fault(&self, text: &str, at: usize, what: &str) -> Error {
        let near: String = text[at..].chars().take(12).collect();
        Error::value(format!("the pattern {:?} {what} at byte {at}, before {near:?}", self.pattern))
    }

    /// Cuts a long text into parts of about `size` bytes whose chunks are the whole text's chunks.
    pub fn parts<'t>(&self, text: &'t str, size: usize) -> Vec<&'t str> {
        let mut parts = Vec::new();
        let mut rest = text;
        if !matches!(self.way, Way::Regex(_)) {
            while rest.len() > 2 * size {
                let Some(cut) = seam(rest.as_bytes(), size) else { break };
                let (part, after) = rest.split_at(cut);
                parts.push(part);
                rest = after;
            }
        }
        parts.push(rest);
        parts
    }
}

/// After `from`: where a line ends in a visible ASCII character and the next begins with an ASCII letter. Every hand-made
/// way has a chunk begin at such a letter, and sees the one line end alike whether or not something follows.
fn seam(text: &[u8], from: usize) -> Option<usize> {
    let line =
        text[from..].windows(3).position(|w| w[0].is_ascii_graphic() && w[1] == b'\n' && w[2].is_ascii_alphabetic());
    line.map(|at| from + at + 2)
}

/// The end of the run of `class` that goes on at `at`.
#[inline(always)]
fn run(classes: &Classes, text: &[u8], mut at: usize, class: u8) -> usize {
    while at < text.len() {
        let (found, length) = classes.at(text, at);
        if found != class {
            break;
        }
        at += length;
    }
    at
}

/// `'s`, `'t`, `'re`, `'ve`, `'m`, `'ll`, `'d` at the apostrophe `at`: its end. `fold` ignores case, where ſ is an s.
fn contraction(text: &[u8], at: usize, fold: bool) -> Option<usize> {
    let case = if fold { 0x20 } else { 0 };
    let letter = |offset: usize| text.get(at + offset).map_or(0, |byte| byte | case);
    match (letter(1), letter(2)) {
        (b's' | b'd' | b'm' | b't', _) => Some(at + 2),
        (b'l', b'l') | (b'v' | b'r', b'e') => Some(at + 3),
        _ if fold && text[at + 1..].starts_with("ſ".as_bytes()) => Some(at + 1 + "ſ".len()),
        _ => None,
    }
}

/// The end of the chunk that begins at `at` under GPT-4's patterns.
#[inline(always)]
fn gpt4(classes: &Classes, text: &[u8], at: usize, digits: usize, tail: bool) -> usize {
    let (class, length) = classes.at(text, at);
    let next = at + length;
    match class {
        LETTER => return run(classes, text, next, LETTER),
        NUMBER => {
            let mut end = next;
            for _ in 1..digits {
                match text.get(end).map(|_| classes.at(text, end)) {
                    Some((NUMBER, length)) => end += length,
                    _ => break,
                }
            }
            return end;
        }
        SPACE | OTHER => {
            if text[at] == b'\''
                && let Some(end) = contraction(text, at, true)
            {
                return end;
            }
            let (class_2, length_2) = if next < text.len() { classes.at(text, next) } else { (NEWLINE, 0) };
            if class_2 == LETTER {
                return run(classes, text, next + length_2, LETTER);
            }
            if class == OTHER || (text[at] == b' ' && class_2 == OTHER) {
                let end = run(classes, text, next, OTHER);
                return run(classes, text, end, NEWLINE);
            }
        }
        _ => {}
    }
    let blanks = Blanks::at(classes, text, at);
    if tail && blanks.end == text.len() { blanks.end } else { blanks.newline.unwrap_or_else(|| blanks.but_one()) }
}

/// The end of the chunk that begins at `at` under GPT-2's pattern.
#[inline(always)]
fn gpt2(classes: &Classes, text: &[u8], at: usize) -> usize {
    if text[at] == b'\''
        && let Some(end) = contraction(text, at, false)
    {
        return end;
    }
    let start = at + usize::from(text[at] == b' ');
    if start < text.len() {
        let (class, length) = classes.at(text, start);
        if class < SPACE {
            return run(classes, text, start + length, class);
        }
    }
    Blanks::at(classes, text, at).but_one()
}

/// A run of white space.
struct Blanks {
    start: usize,
    /// Where its last character begins.
    last: usize,
    end: usize,
    /// The end of its last `\r` or `\n`.
    newline: Option<usize>,
    /// Nothing follows.
    ends: bool,
}

impl Blanks {
    fn at(classes: &Classes, text: &[u8], start: usize) -> Self {
        let mut blanks = Self { start, last: start, end: start, newline: None, ends: true };
        while blanks.end < text.len() {
            let (class, length) = classes.at(text, blanks.end);
            if class < SPACE {
                blanks.ends = false;
                break;
            }
            blanks.last = blanks.end;
            blanks.end += length;
            if class == NEWLINE {
                blanks.newline = Some(blanks.end);
            }
        }
        blanks
    }

    /// `\s+(?!\S)|\s+`: the last blank goes with what follows, unless it is the only one.
    fn but_one(&self) -> usize {
        if self.ends || self.last == self.start { self.end } else { self.last }
    }
}
