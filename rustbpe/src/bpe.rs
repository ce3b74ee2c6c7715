//! A trained tokenizer: pattern, vocabulary, special tokens.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use aho_corasick::{AhoCorasick, MatchKind};

use crate::encode::{Scratch, encode_chunk};
use crate::error::{Error, Result};
use crate::parallel;
use crate::split::Splitter;
use crate::vocab::{MOST_IDS, PADDING, Vocab};

/// Which special tokens a text may hold as such (they become their ids), and which it must not hold (an error). In the
/// text, any other is ordinary.
#[derive(Default)]
pub struct Specials {
    allowed: Option<Finder>,
    disallowed: Option<Finder>,
}

/// Finds the leftmost of some strings, the longest of those.
struct Finder {
    machine: AhoCorasick,
    strings: Vec<String>,
}

impl Finder {
    fn new(strings: Vec<String>) -> Result<Option<Self>> {
        let strings: Vec<String> = strings.into_iter().filter(|string| !string.is_empty()).collect();
        if strings.is_empty() {
            return Ok(None);
        }
        let machine = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&strings);
        let machine = machine.map_err(|error| Error::value(format!("these special tokens: {error}")))?;
        Ok(Some(Self { machine, strings }))
    }

    fn find(&self, text: &str, from: usize) -> Option<(Range<usize>, &str)> {
        let found = self.machine.find(&text[from..])?;
        Some((from + found.start()..from + found.end(), &self.strings[found.pattern().as_usize()]))
    }
}

/// Some special tokens, as a caller names them.
pub enum Names {
    All,
    These(HashSet<String>),
}

impl Names {
    pub fn none() -> Self {
        Self::These(HashSet::new())
    }
}

/// What one thread needs of its own: a regex engine's scratch space is not shared well.
struct Worker {
    splitter: Splitter,
    scratch: Scratch,
}

pub struct Bpe {
    splitter: Splitter,
    vocab: Vocab,
    specials: Vec<(String, u32)>,
    id_of: HashMap<String, u32>,
    name_of: HashMap<u32, usize>,
    /// What workers of earlier calls remember.
    spare: Mutex<Vec<Worker>>,
}

impl Bpe {
    /// Errors: two special tokens with one name or id, an empty one, an id that a token has.
    pub fn new(splitter: Splitter, vocab: Vocab, specials: Vec<(String, u32)>) -> Result<Self> {
        let (mut id_of, mut name_of) = (HashMap::new(), HashMap::new());
        for (place, (name, id)) in specials.iter().enumerate() {
            if name.is_empty() {
                return Err(Error::value("a special token must not be empty"));
            }
            if id_of.insert(name.clone(), *id).is_some() {
                return Err(Error::value(format!("the special token {name:?} is there already")));
            }
            if vocab.token(*id).is_some() || name_of.insert(*id, place).is_some() || *id as usize >= MOST_IDS {
                return Err(Error::value(format!("the special token {name:?} cannot have the id {id}")));
            }
        }
        Ok(Self { splitter, vocab, specials, id_of, name_of, spare: Mutex::default() })
    }

    /// The same with other tokens; the special ones come after them, in their order.
    pub fn from_merges(splitter: Splitter, merges: &[(u32, u32)], specials: &[(String, u32)]) -> Result<Self> {
        let vocab = Vocab::from_merges(merges)?;
        let names = specials.iter().map(|(name, _)| name.clone());
        let specials = names.zip(vocab.ids()..).collect();
        Self::new(splitter, vocab, specials)
    }

    /// The same with more special tokens, whose ids follow the highest id.
    pub fn with_specials(&self, names: Vec<String>) -> Result<Self> {
        let mut specials = self.specials.clone();
        specials.extend(names.into_iter().zip(self.ids()..));
        let vocab = Vocab::new((0..self.vocab.ids()).map(|id| self.vocab.token(id).unwrap_or_default()))?;
        Self::new(self.splitter.clone(), vocab, specials)
    }

    pub fn pattern(&self) -> &str {
        self.splitter.pattern()
    }

    pub fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    /// Special tokens with their ids, in the order in which they were added.
    pub fn specials(&self) -> &[(String, u32)] {
        &self.specials
    }

    /// One more than the highest id.
    pub fn ids(&self) -> u32 {
        self.specials.iter().map(|(_, id)| id + 1).fold(self.vocab.ids(), u32::max)
    }

    pub fn special_id(&self, name: &str) -> Option<u32> {
        self.id_of.get(name).copied()
    }

    /// Errors: an allowed token that is not there.
    pub fn choose(&self, allowed: &Names, disallowed: &Names) -> Result<Specials> {
        let all = || self.specials.iter().map(|(name, _)| name.clone());
        let allowed_names: Vec<String> = match allowed {
            Names::All => all().collect(),
            Names::These(names) => names.iter().cloned().collect(),
        };
        if let Some(name) = allowed_names.iter().find(|name| !self.id_of.contains_key(*name)) {
            return Err(Error::value(format!("there is no special token {name:?} to allow")));
        }
        let disallowed = match disallowed {
            Names::All => all().filter(|name| !allowed_names.contains(name)).collect(),
            Names::These(names) => names.iter().cloned().collect(),
        };
        Ok(Specials { allowed: Finder::new(allowed_names)?, disallowed: Finder::new(disallowed)? })
    }

    pub fn encode(&self, text: &str, specials: &Specials) -> Result<Vec<u32>> {
        let mut worker = self.take_worker();
        let result = self.encode_with(text, specials, &mut worker);
        self.spare().push(worker);
        result
    }

    /// Each of the texts on one of `threads` threads; `watch` is called meanwhile.
    pub fn encode_batch(
        &self,
        texts: &[&str],
        specials: &Specials,
        threads: usize,
        watch: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<Vec<u32>>> {
        let next = AtomicUsize::new(0);
        let work = |made: &mut Vec<(usize, Vec<u32>)>, stop: &AtomicBool| {
            let mut worker = self.take_worker();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(text) = texts.get(at) else { break };
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                made.push((at, self.encode_with(text, specials, &mut worker)?));
            }
            self.spare().push(worker);
            Ok(())
        };
        let mut made: Vec<Vec<(usize, Vec<u32>)>> = Vec::new();
        made.resize_with(threads.clamp(1, texts.len().max(1)), Vec::new);
        parallel::run(made.iter_mut().collect(), work, watch)?;
        let mut all = vec![Vec::new(); texts.len()];
        for (at, ids) in made.into_iter().flatten() {
            all[at] = ids;
        }
        Ok(all)
    }

    fn encode_with(&self, text: &str, specials: &Specials, worker: &mut Worker) -> Result<Vec<u32>> {
        if text.len() >= u32::MAX as usize {
            return Err(Error::value("a text of 4 GB or more: encode it in parts"));
        }
        if let Some((_, name)) = specials.disallowed.as_ref().and_then(|finder| finder.find(text, 0)) {
            return Err(Error::value(format!(
                "the text holds the special token {name:?}: allow it (allowed_special), or have it encoded as ordinary text \
                 (disallowed_special=())"
            )));
        }
        let mut out = Vec::with_capacity(text.len() / 4 + 8);
        let mut at = 0;
        while let Some((place, name)) = specials.allowed.as_ref().and_then(|finder| finder.find(text, at)) {
            self.encode_ordinary(&text[at..place.start], worker, &mut out)?;
            out.extend(self.special_id(name));
            at = place.end;
        }
        self.encode_ordinary(&text[at..], worker, &mut out)?;
        Ok(out)
    }

    fn encode_ordinary(&self, text: &str, worker: &mut Worker, out: &mut Vec<u32>) -> Result<()> {
        let Worker { splitter, scratch } = worker;
        let bytes = text.as_bytes();
        splitter.split(text, |start, end| encode_chunk(&self.vocab, bytes, start, end, scratch, out))
    }

    fn spare(&self) -> MutexGuard<'_, Vec<Worker>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_worker(&self) -> Worker {
        let spare = self.spare().pop();
        spare.unwrap_or_else(|| Worker { splitter: self.splitter.clone(), scratch: Scratch::default() })
    }

    /// The bytes of some ids, special tokens as their names.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>> {
        let mut length = 0;
        for &id in ids {
            length += match self.vocab.token(id) {
                Some(token) => token.len(),
                None => self.special(id)?.len(),
            };
        }
        let mut bytes = vec![0; length + PADDING];
        let mut at = 0;
        for &id in ids {
            if let Some((sixteen, length @ ..=PADDING)) = self.vocab.padded(id) {
                bytes[at..at + PADDING].copy_from_slice(sixteen); // one move, whatever the length
                at += length;
                continue;
            }
            let token = match self.vocab.token(id) {
                Some(token) => token,
                None => self.special(id)?.as_bytes(),
            };
            bytes[at..at + token.len()].copy_from_slice(token);
            at += token.len();
        }
        bytes.truncate(length);
        Ok(bytes)
    }

    fn special(&self, id: u32) -> Result<&str> {
        match self.name_of.get(&id) {
            Some(&place) => Ok(&self.specials[place].0),
            None => Err(Error::value(format!("the id {id} is not in the vocabulary of {}", self.ids()))),
        }
    }
}
