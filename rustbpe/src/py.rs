//! The Python module: arguments in, results out. Work is done with the interpreter's lock released.

mod convert;

use std::collections::HashMap;
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pyo3::exceptions::{PyKeyError, PyUserWarning, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyList, PyString};

use convert::{Argument, Text, buffered, names, read, strs, watched};

use crate::bpe::{Bpe, Names, Specials};
use crate::error::Error;
use crate::parallel;
use crate::split::{CL100K_PATTERN, DEFAULT_PATTERN, GPT2_PATTERN, NANOCHAT_PATTERN, Splitter};
use crate::train::Trainer;
use crate::vocab::MOST_IDS;

/// One state of a tokenizer; a call works on the one that it found.
struct State {
    bpe: Bpe,
    /// An int for each id, made once: a list of ids then costs 8 bytes an id, not 36.
    ints: PyOnceLock<Vec<Py<PyAny>>>,
    /// No special token allowed and all disallowed, as calls mostly have it.
    usual: OnceLock<Arc<Specials>>,
}

impl State {
    fn new(bpe: Bpe) -> Arc<Self> {
        Arc::new(Self { bpe, ints: PyOnceLock::new(), usual: OnceLock::new() })
    }

    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        let ints = self.ints.get_or_try_init(py, || {
            (0..self.bpe.ids()).map(|id| Ok(id.into_pyobject(py)?.into_any().unbind())).collect::<PyResult<_>>()
        })?;
        PyList::new(py, ids.iter().map(|&id| ints[id as usize].bind_borrowed(py)))
    }

    fn specials(&self, allowed: Option<Argument>, disallowed: Option<Argument>) -> PyResult<Arc<Specials>> {
        let allowed = names(allowed, "allowed_special", Names::none())?;
        let disallowed = names(disallowed, "disallowed_special", Names::All)?;
        if let (Names::These(names), Names::All) = (&allowed, &disallowed)
            && names.is_empty()
        {
            if let Some(usual) = self.usual.get() {
                return Ok(usual.clone());
            }
            let usual = Arc::new(self.bpe.choose(&allowed, &disallowed)?);
            return Ok(self.usual.get_or_init(|| usual).clone());
        }
        Ok(Arc::new(self.bpe.choose(&allowed, &disallowed)?))
    }
}

/// A byte-pair tokenizer: train it, load it or import it; then encode and decode.
#[pyclass(module = "rustbpe", frozen)]
struct Tokenizer {
    state: Mutex<Arc<State>>,
}

impl From<Bpe> for Tokenizer {
    fn from(bpe: Bpe) -> Self {
        Self { state: Mutex::new(State::new(bpe)) }
    }
}

impl Tokenizer {
    fn state(&self) -> Arc<State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn decoded(&self, py: Python<'_>, ids: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
        let (state, ids) = (self.state(), convert::ids(ids)?);
        let work = || parallel::guarded(|| state.bpe.decode(&ids));
        Ok(if ids.len() < FEW { work() } else { py.detach(work) }?)
    }

    fn set(&self, bpe: Bpe) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = State::new(bpe);
    }
}

/// Fewer ids or bytes than this are worked on with the lock held: to release it would take longer.
const FEW: usize = 1 << 10;

fn encoded(py: Python<'_>, state: &State, text: Argument, specials: &Specials) -> PyResult<Vec<u32>> {
    let text = Text::new(text)?;
    let text = text.as_str()?;
    let work = || parallel::guarded(|| state.bpe.encode(text, specials));
    Ok(if text.len() < FEW { work() } else { py.detach(work) }?)
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Bpe::from_merges(Splitter::new(DEFAULT_PATTERN)?, &[], &[])?.into())
    }

    /// Learns a vocabulary of `vocab_size` tokens: 256 bytes, merges, special tokens added before. Texts are taken from
    /// the iterator `buffer_size` at a time; only their distinct words are kept. `progress(done, wanted)` counts merges.
    /// Warns where the text gives fewer merges. After an error or Ctrl-C the tokenizer is what it was before.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, progress=None))]
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: i64,
        pattern: Option<&str>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let special = self.state().bpe.specials().to_vec();
        let least = 256 + special.len() as i64;
        if !(least..=MOST_IDS as i64).contains(&vocab_size) {
            let message = format!(
                "vocab_size must be {least} (256 bytes, {} special tokens) to {MOST_IDS}, not {vocab_size}",
                special.len()
            );
            return Err(PyValueError::new_err(message));
        }
        if buffer_size < 1 {
            return Err(PyValueError::new_err(format!("buffer_size must be at least 1, not {buffer_size}")));
        }
        let wanted = (vocab_size - least) as usize;
        let splitter = Splitter::new(pattern.unwrap_or(DEFAULT_PATTERN))?;
        let mut trainer = Trainer::new(&splitter, parallel::threads());
        let mut iterator = iterator.try_iter()?;
        loop {
            let waiting = buffered(&mut iterator, buffer_size as usize)?;
            if waiting.is_empty() {
                break;
            }
            watched(py, |_, _| Ok(()), |watch| trainer.feed(&strs(&waiting)?, watch))?;
        }
        let look = |py: Python<'_>, done: usize| match &progress {
            Some(progress) => progress.call1(py, (done, wanted)).map(drop),
            None => Ok(()),
        };
        let (bpe, made) = watched(py, look, |watch| {
            let merges = trainer.merges(wanted, watch)?;
            Ok((Bpe::from_merges(splitter, &merges, &special)?, merges.len()))
        })?;
        self.set(bpe);
        if made < wanted {
            let reached = vocab_size - (wanted - made) as i64;
            let message =
                CString::new(format!("the text gives a vocabulary of {reached}, not {vocab_size}: no pair is left"))?;
            PyErr::warn(py, &py.get_type::<PyUserWarning>(), &message, 1)?;
        }
        Ok(())
    }

    /// The ids of a text. Special tokens in it: `allowed_special` (a set, or "all") become their ids,
    /// `disallowed_special` (by default all others) are an error, the rest are ordinary text.
    #[pyo3(signature = (text, *, allowed_special=None, disallowed_special=None))]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        text: &Bound<'py, PyAny>,
        allowed_special: Option<&Bound<'py, PyAny>>,
        disallowed_special: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyList>> {
        let state = self.state();
        let specials = state.specials(allowed_special, disallowed_special)?;
        state.list(py, &encoded(py, &state, text, &specials)?)
    }

    /// The ids of a text in which special tokens are ordinary text.
    fn encode_ordinary<'py>(&self, py: Python<'py>, text: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyList>> {
        let state = self.state();
        state.list(py, &encoded(py, &state, text, &Specials::default())?)
    }

    /// As `encode`, into a numpy array of uint32.
    #[pyo3(signature = (text, *, allowed_special=None, disallowed_special=None))]
    fn encode_to_numpy<'py>(
        &self,
        py: Python<'py>,
        text: &Bound<'py, PyAny>,
        allowed_special: Option<&Bound<'py, PyAny>>,
        disallowed_special: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let state = self.state();
        let specials = state.specials(allowed_special, disallowed_special)?;
        let ids = encoded(py, &state, text, &specials)?;
        let bytes = PyByteArray::new_with(py, ids.len() * 4, |bytes| {
            for (place, id) in bytes.chunks_exact_mut(4).zip(&ids) {
                place.copy_from_slice(&id.to_ne_bytes());
            }
            Ok(())
        })?;
        py.import("numpy")?.call_method1("frombuffer", (bytes, "uint32"))
    }

    /// As `encode`, of many texts on `num_threads` threads (by default all).
    #[pyo3(signature = (texts, *, num_threads=None, allowed_special=None, disallowed_special=None))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<i64>,
        allowed_special: Option<&Bound<'py, PyAny>>,
        disallowed_special: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyList>> {
        let threads = match num_threads {
            Some(threads) if threads < 1 => {
                return Err(PyValueError::new_err(format!("num_threads must be at least 1, not {threads}")));
            }
            Some(threads) => threads.min(1024) as usize,
            None => parallel::threads(),
        };
        let state = self.state();
        let specials = state.specials(allowed_special, disallowed_special)?;
        let texts = texts.try_iter()?.map(|text| Text::new(&text?)).collect::<PyResult<Vec<Text>>>()?;
        let lists = watched(
            py,
            |_, _| Ok(()),
            |watch| state.bpe.encode_batch(&strs(&texts)?, &specials, threads, &mut || watch(0)),
        )?;
        let all = PyList::empty(py);
        for ids in lists {
            all.append(state.list(py, &ids)?)?;
        }
        Ok(all)
    }

    /// `encode_batch` under the published package's name.
    #[pyo3(signature = (texts, *, num_threads=None, allowed_special=None, disallowed_special=None))]
    fn batch_encode<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<i64>,
        allowed_special: Option<&Bound<'py, PyAny>>,
        disallowed_special: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyList>> {
        self.encode_batch(py, texts, num_threads, allowed_special, disallowed_special)
    }

    /// The text of some ids. Bytes that are no UTF-8 are replaced, or what `errors` says as for `bytes.decode`.
    #[pyo3(signature = (ids, errors="replace"))]
    fn decode<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>, errors: &str) -> PyResult<Bound<'py, PyString>> {
        match String::from_utf8(self.decoded(py, ids)?) {
            Ok(text) => Ok(PyString::new(py, &text)),
            Err(error) => {
                let (bytes, errors) = (PyBytes::new(py, error.as_bytes()), CString::new(errors)?);
                PyString::from_encoded_object(&bytes, Some(c"utf-8"), Some(&errors))
            }
        }
    }

    fn decode_bytes<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.decoded(py, ids)?))
    }

    /// One more than the highest id: 256 bytes, merges, special tokens.
    #[getter]
    fn vocab_size(&self) -> u32 {
        self.state().bpe.ids()
    }

    fn get_pattern(&self) -> String {
        self.state().bpe.pattern().to_owned()
    }

    /// Tokens as bytes with their ids, without the special ones.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        self.state().bpe.vocab().tokens().map(|(id, token)| (PyBytes::new(py, token), id)).collect()
    }

    /// Gives each of these the next id after the highest.
    fn add_special_tokens(&self, tokens: Vec<String>) -> PyResult<()> {
        let bpe = self.state().bpe.with_specials(tokens)?;
        self.set(bpe);
        Ok(())
    }

    /// The special tokens and their ids, in the order in which they were added.
    fn special_tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let specials = PyDict::new(py);
        for (name, id) in self.state().bpe.specials() {
            specials.set_item(name, id)?;
        }
        Ok(specials)
    }

    /// The id of a special token or of an ordinary one (str or bytes); KeyError if it is neither.
    fn encode_single_token(&self, token: &Bound<'_, PyAny>) -> PyResult<u32> {
        let state = self.state();
        let id = match token.extract::<PyBackedBytes>() {
            Ok(bytes) => state.bpe.vocab().id(&bytes),
            Err(_) => {
                let text = Text::new(token)?;
                let text = text.as_str()?;
                state.bpe.special_id(text).or_else(|| state.bpe.vocab().id(text.as_bytes()))
            }
        };
        match id {
            Some(id) => Ok(id),
            None => Err(PyKeyError::new_err(format!("there is no token {}", token.repr()?))),
        }
    }

    /// Writes a JSON file, whole or not at all.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        let state = self.state();
        Ok(py.detach(|| parallel::guarded(|| state.bpe.save(&path)))?)
    }

    /// Reads what `save` wrote. ValueError where the file is damaged or something else.
    #[staticmethod]
    fn load(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(py.detach(|| parallel::guarded(|| Bpe::load(&path)))?.into())
    }

    /// What `tiktoken.Encoding(**…)` takes.
    #[pyo3(signature = (name="rustbpe"))]
    fn to_tiktoken<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyDict>> {
        let (fields, ranks) = (PyDict::new(py), PyDict::new(py));
        for (token, id) in self.get_mergeable_ranks(py) {
            ranks.set_item(token, id)?;
        }
        fields.set_item("name", name)?;
        fields.set_item("pat_str", self.get_pattern())?;
        fields.set_item("mergeable_ranks", ranks)?;
        fields.set_item("special_tokens", self.special_tokens(py)?)?;
        Ok(fields)
    }

    /// A tokenizer.json: `tokenizers.Tokenizer.from_str` makes the same ids of a text.
    fn to_huggingface(&self, py: Python<'_>) -> PyResult<String> {
        let state = self.state();
        Ok(py.detach(|| parallel::guarded(|| state.bpe.to_huggingface()))?)
    }

    /// From a tiktoken file (its path, or its content as bytes): a line a token, in base64, and its id.
    #[staticmethod]
    #[pyo3(signature = (path_or_bytes, pattern, special_tokens=None))]
    fn from_tiktoken(
        py: Python<'_>,
        path_or_bytes: &Bound<'_, PyAny>,
        pattern: &str,
        special_tokens: Option<HashMap<String, i64>>,
    ) -> PyResult<Self> {
        let id = |id: i64| u32::try_from(id).unwrap_or(u32::MAX); // which no token can have
        let specials = special_tokens.unwrap_or_default().into_iter().map(|(name, number)| (name, id(number)));
        let mut specials: Vec<(String, u32)> = specials.collect();
        specials.sort_by_key(|special| special.1);
        let content = match path_or_bytes.extract::<PyBackedBytes>() {
            Ok(bytes) => bytes.to_vec(),
            Err(_) => read(&path_or_bytes.extract::<PathBuf>()?)?,
        };
        Ok(py.detach(|| parallel::guarded(|| Bpe::from_tiktoken(&content, pattern, specials)))?.into())
    }

    /// From GPT-2's own two files, with its own ids.
    #[staticmethod]
    fn from_gpt2(py: Python<'_>, encoder_json_path: PathBuf, vocab_bpe_path: PathBuf) -> PyResult<Self> {
        let (encoder, merges) = (read(&encoder_json_path)?, read(&vocab_bpe_path)?);
        let work = || {
            let text = |bytes| String::from_utf8(bytes).map_err(|_| Error::value("GPT-2's files must be UTF-8"));
            Bpe::from_gpt2(&text(encoder)?, &text(merges)?)
        };
        Ok(py.detach(|| parallel::guarded(work))?.into())
    }

    fn __repr__(&self) -> String {
        let state = self.state();
        format!("<rustbpe.Tokenizer: {} tokens, {} of them special>", state.bpe.ids(), state.bpe.specials().len())
    }
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("DEFAULT_PATTERN", DEFAULT_PATTERN)?;
    module.add("NANOCHAT_PATTERN", NANOCHAT_PATTERN)?;
    module.add("GPT2_PATTERN", GPT2_PATTERN)?;
    module.add("CL100K_PATTERN", CL100K_PATTERN)?;
    module.add_class::<Tokenizer>()
}
