//! Tokenizers in files and in other libraries' formats.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::bpe::Bpe;
use crate::error::{Error, Result};
use crate::split::{CL100K_PATTERN, DEFAULT_PATTERN, GPT2_PATTERN, Splitter};
use crate::vocab::{MOST_IDS, Vocab};

const FORMAT: &str = "rustbpe";
const VERSION: u32 = 1;

/// What `save` writes: JSON with a line a token, whose bytes stand as GPT-2's printable characters ("Ġthe" is " the").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    format: String,
    version: u32,
    /// Of pattern, special tokens and tokens.
    checksum: String,
    pattern: String,
    special_tokens: Vec<(String, u32)>,
    /// In the order of their ids; empty for an id that is not used.
    tokens: Vec<String>,
}

impl Saved {
    /// FNV-1a, 64 bits: finds damage, not forgery.
    fn sum(&self) -> String {
        let mut sum = 0xcbf2_9ce4_8422_2325_u64;
        let mut add = |text: &str| {
            for &byte in text.as_bytes().iter().chain(&[0xff]) {
                sum = (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
        };
        add(&self.pattern);
        for (name, id) in &self.special_tokens {
            add(name);
            add(&id.to_string());
        }
        self.tokens.iter().for_each(|token| add(token));
        format!("{sum:016x}")
    }
}

/// GPT-2's printable character for each byte.
fn printable() -> [char; 256] {
    let (mut of_byte, mut other) = (['\0'; 256], 256);
    for byte in 0..=255_u8 {
        of_byte[usize::from(byte)] = if matches!(byte, 33..=126 | 161..=172 | 174..) {
            char::from(byte)
        } else {
            other += 1;
            char::from_u32(other - 1).unwrap_or_default()
        };
    }
    of_byte
}

fn printed(token: &[u8], of_byte: &[char; 256]) -> String {
    token.iter().map(|&byte| of_byte[usize::from(byte)]).collect()
}

/// The bytes of a printed token; none where a character stands for no byte.
fn unprinted(token: &str, byte_of: &HashMap<char, u8>) -> Option<Vec<u8>> {
    token.chars().map(|character| byte_of.get(&character).copied()).collect()
}

fn byte_of() -> HashMap<char, u8> {
    printable().into_iter().zip(0..=255).collect()
}

impl Bpe {
    /// Writes the file whole or not at all.
    pub fn save(&self, path: &Path) -> Result<()> {
        let of_byte = printable();
        let tokens = (0..self.vocab().ids()).map(|id| printed(self.vocab().token(id).unwrap_or_default(), &of_byte));
        let mut saved = Saved {
            format: FORMAT.to_owned(),
            version: VERSION,
            checksum: String::new(),
            pattern: self.pattern().to_owned(),
            special_tokens: self.specials().to_vec(),
            tokens: tokens.collect(),
        };
        saved.checksum = saved.sum();
        let text = serde_json::to_string_pretty(&saved).map_err(|error| Error::Internal(error.to_string()))?;
        replace(path, text.as_bytes()).map_err(|error| Error::file(path, error))
    }

    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read(path).map_err(|error| Error::file(path, error))?;
        let damaged = |what: String| Error::value(format!("{}: {what}", path.display()));
        let saved: Saved =
            serde_json::from_slice(&text).map_err(|error| damaged(format!("not a saved tokenizer: {error}")))?;
        if saved.format != FORMAT || saved.version != VERSION {
            return Err(damaged(format!(
                "{:?} version {}, not {FORMAT:?} version {VERSION}",
                saved.format, saved.version
            )));
        }
        if saved.checksum != saved.sum() {
            return Err(damaged("damaged: the checksum is another".to_owned()));
        }
        let byte_of = byte_of();
        let tokens: Option<Vec<Vec<u8>>> = saved.tokens.iter().map(|token| unprinted(token, &byte_of)).collect();
        let tokens = tokens.ok_or_else(|| damaged("damaged: a token of no bytes".to_owned()))?;
        let vocab = Vocab::new(tokens.iter().map(Vec::as_slice)).map_err(|error| damaged(error.to_string()))?;
        let splitter = Splitter::new(&saved.pattern).map_err(|error| damaged(error.to_string()))?;
        Self::new(splitter, vocab, saved.special_tokens).map_err(|error| damaged(error.to_string()))
    }

    /// From tiktoken's format: a line a token, its bytes in base64 and its id.
    pub fn from_tiktoken(text: &[u8], pattern: &str, specials: Vec<(String, u32)>) -> Result<Self> {
        let mut tokens = Vec::new();
        for (line, number) in text.split(|&byte| byte == b'\n').zip(1..) {
            let fault = |what: &str| Error::value(format!("line {number}: {what}, not a token in base64 and its id"));
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            let mut words = line.split(|&byte| byte == b' ');
            let (Some(token), Some(id), None) = (words.next(), words.next(), words.next()) else {
                return Err(fault("two words wanted"));
            };
            let token = BASE64_STANDARD.decode(token).map_err(|error| fault(&error.to_string()))?;
            let id = str::from_utf8(id).ok().and_then(|id| id.parse::<usize>().ok());
            let id = id.filter(|&id| id < MOST_IDS).ok_or_else(|| fault("no id"))?;
            if token.is_empty() {
                return Err(fault("no bytes"));
            }
            tokens.push((token, id));
        }
        let vocab = Vocab::new(by_id(&tokens)?.into_iter())?;
        Self::new(Splitter::new(pattern)?, vocab, specials)
    }

    /// From GPT-2's `encoder.json` (tokens and ids) and `vocab.bpe` (merges): its own ids; what no merge makes is special.
    pub fn from_gpt2(encoder: &str, merges: &str) -> Result<Self> {
        let fault = |what: String| Error::value(format!("not GPT-2's encoder.json and vocab.bpe: {what}"));
        let ids: BTreeMap<String, usize> = serde_json::from_str(encoder).map_err(|error| fault(error.to_string()))?;
        let byte_of = byte_of();
        let mut names: Vec<String> = byte_of.keys().map(char::to_string).collect();
        for line in merges.lines().filter(|line| !line.starts_with("#version") && !line.is_empty()) {
            let (left, right) = line.split_once(' ').ok_or_else(|| fault(format!("the merge {line:?}")))?;
            names.push([left, right].concat());
        }
        let mut tokens = Vec::new();
        for name in &names {
            let id = ids.get(name).filter(|&&id| id < MOST_IDS);
            match (unprinted(name, &byte_of), id) {
                (Some(token), Some(&id)) => tokens.push((token, id)),
                _ => return Err(fault(format!("the token {name:?}"))),
            }
        }
        if let Some(out_of_order) = tokens[256..].windows(2).find(|two| two[0].1 >= two[1].1) {
            return Err(fault(format!(
                "the ids {} and {} are not in the order of the merges",
                out_of_order[0].1, out_of_order[1].1
            )));
        }
        let vocab = Vocab::new(by_id(&tokens)?.into_iter())?;
        let ordinary: HashSet<&str> = names.iter().map(String::as_str).collect();
        let others = ids.iter().filter(|(name, _)| !ordinary.contains(name.as_str()));
        let mut specials: Vec<(String, u32)> =
            others.map(|(name, &id)| (name.clone(), id.min(MOST_IDS) as u32)).collect();
        specials.sort_by_key(|special| special.1);
        Self::new(Splitter::new(GPT2_PATTERN)?, vocab, specials)
    }

    /// A `tokenizer.json` for Hugging Face's `tokenizers`, which gives the same ids.
    pub fn to_huggingface(&self) -> Result<String> {
        let (of_byte, vocab) = (printable(), self.vocab());
        let name = |id: u32| printed(vocab.token(id).unwrap_or_default(), &of_byte);
        let mut ids = serde_json::Map::new();
        let mut merges = Vec::new();
        for (id, _) in vocab.tokens() {
            ids.insert(name(id), id.into());
            let mut halves = vocab.halves(id);
            halves.sort_unstable();
            merges.extend(halves.into_iter().map(|(left, right)| json!([name(left), name(right)])));
        }
        for (special, id) in self.specials() {
            if ids.insert(special.clone(), (*id).into()).is_some() {
                return Err(Error::value(format!(
                    "Hugging Face's format cannot tell the special token {special:?} from a token"
                )));
            }
        }
        let added = self.specials().iter().map(|(special, id)| {
            json!({"id": id, "content": special, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                   "special": true})
        });
        let split =
            json!({"type": "Split", "pattern": {"Regex": self.oniguruma()?}, "behavior": "Isolated", "invert": false});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
        let tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": null,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes]},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
                      "vocab": ids, "merges": merges},
        });
        Ok(tokenizer.to_string())
    }

    /// The pattern in Oniguruma's dialect, in which `{1,3}+` is not possessive and `$` ends a line.
    fn oniguruma(&self) -> Result<String> {
        if self.pattern() == CL100K_PATTERN {
            return Ok(DEFAULT_PATTERN.replace(r"|\s*[\r\n]|", r"|\s+\z|\s*[\r\n]|"));
        }
        let pattern = self.pattern().replace(r"\s++$", r"\s+\z");
        let counted =
            |part: &str| part.rsplit('{').next().is_some_and(|count| count.starts_with(|c: char| c.is_ascii_digit()));
        let mut before_plus = pattern.split("}+").collect::<Vec<_>>();
        before_plus.pop();
        if before_plus.into_iter().any(counted) || pattern.contains('$') {
            return Err(Error::value(format!("Hugging Face's regex engine reads the pattern {pattern:?} otherwise")));
        }
        Ok(pattern)
    }
}

/// Tokens in the order of their ids, with empty ones between.
fn by_id(tokens: &[(Vec<u8>, usize)]) -> Result<Vec<&[u8]>> {
    let mut by_id = Vec::new();
    for (token, id) in tokens {
        if by_id.len() <= *id {
            by_id.resize(id + 1, [].as_slice());
        }
        if !by_id[*id].is_empty() {
            return Err(Error::value(format!("the id {id} is there twice")));
        }
        by_id[*id] = token;
    }
    Ok(by_id)
}

/// Writes beside the file and renames: a crash leaves the old one.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
    let write = || {
        let mut file = File::create(&beside)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().inspect_err(|_| drop(fs::remove_file(&beside)))
}
