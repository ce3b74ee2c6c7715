//! Between Python's values and ours, and between the interpreter's lock and work without it.

use std::path::Path;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTypeError, PyUnicodeEncodeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::{PyIterator, PyList, PyString};

use crate::bpe::Names;
use crate::error::{Error, Result};
use crate::parallel;

/// Texts are counted when this many bytes are waiting, even if they are fewer than the buffer takes.
const BUFFER_BYTES: usize = 1 << 25;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let line = error.to_string();
        match error {
            Error::Value(_) => PyValueError::new_err(line),
            Error::File(path, error) => match error.raw_os_error() {
                Some(code) => {
                    let text = error.to_string();
                    let text = text.split(" (os error").next().unwrap_or_default().to_owned();
                    PyOSError::new_err((code, text, path))
                }
                None => PyOSError::new_err(line),
            },
            Error::Stopped | Error::Internal(_) => PyRuntimeError::new_err(line),
        }
    }
}

/// A text as UTF-8: a str's own bytes where it is ASCII; else a copy, because the str would keep one for ever.
pub enum Text {
    Ascii(PyBackedStr),
    Copy(PyBackedBytes),
}

impl Text {
    pub fn new(text: &Bound<'_, PyAny>) -> PyResult<Self> {
        let Ok(text) = text.cast::<PyString>() else {
            return Err(PyTypeError::new_err(format!("a text must be a str, not {}", text.get_type().name()?)));
        };
        if text.call_method0("isascii")?.is_truthy()? {
            return Ok(Self::Ascii(text.clone().try_into()?));
        }
        match text.encode_utf8() {
            Ok(bytes) => Ok(Self::Copy(bytes.into())),
            Err(error) if error.is_instance_of::<PyUnicodeEncodeError>(text.py()) => {
                // lone surrogates become U+FFFD, pairs become their character, as in tiktoken
                let utf_16 = text.call_method1("encode", ("utf-16", "surrogatepass"))?;
                let text = utf_16.call_method1("decode", ("utf-16", "replace"))?;
                Ok(Self::Copy(text.cast::<PyString>()?.encode_utf8()?.into()))
            }
            Err(error) => Err(error),
        }
    }

    pub fn as_str(&self) -> Result<&str> {
        match self {
            Self::Ascii(text) => Ok(text),
            Self::Copy(bytes) => str::from_utf8(bytes).map_err(|error| Error::Internal(error.to_string())),
        }
    }
}

pub fn strs(texts: &[Text]) -> Result<Vec<&str>> {
    texts.iter().map(Text::as_str).collect()
}

/// Runs `work` without the interpreter's lock. It calls the watch that it is given; that calls `look` with the lock, whose
/// error then ends the work and is raised.
pub fn watched<T: Send>(
    py: Python<'_>,
    look: impl Fn(Python<'_>, usize) -> PyResult<()> + Send + Sync,
    work: impl FnOnce(&mut dyn FnMut(usize) -> Result<()>) -> Result<T> + Send,
) -> PyResult<T> {
    let mut raised = None;
    let result = py.detach(|| {
        let mut watch = |done| {
            Python::attach(|py| py.check_signals().and_then(|()| look(py, done))).map_err(|error| {
                raised = Some(error);
                Error::Stopped
            })
        };
        parallel::guarded(|| work(&mut watch))
    });
    match raised {
        Some(error) => Err(error),
        None => Ok(result?),
    }
}

pub type Argument<'a, 'py> = &'a Bound<'py, PyAny>;

/// A set of strings, or "all".
pub fn names(value: Option<Argument>, argument: &str, default: Names) -> PyResult<Names> {
    let Some(value) = value else { return Ok(default) };
    if let Ok(text) = value.cast::<PyString>() {
        return match text.to_str()? {
            "all" => Ok(Names::All),
            text => Err(PyValueError::new_err(format!("{argument}: \"all\" or a set of tokens, not {text:?}"))),
        };
    }
    let names: PyResult<_> = value.try_iter()?.map(|name| name?.extract::<String>()).collect();
    Ok(Names::These(names?))
}

pub fn ids(value: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let id = |item: &Bound<'_, PyAny>| {
        item.extract::<u32>().map_err(|error| {
            if error.is_instance_of::<PyTypeError>(item.py()) {
                return PyTypeError::new_err(format!("an id must be an int, not {item:?}"));
            }
            PyValueError::new_err(format!("the id {item} is not in the vocabulary"))
        })
    };
    if let Ok(list) = value.cast::<PyList>() {
        let mut ids = Vec::with_capacity(list.len());
        for at in 0..list.len() {
            ids.push(id(&list.get_item(at)?)?);
        }
        return Ok(ids);
    }
    if let Ok(buffer) = PyBuffer::<u32>::get(value)
        && buffer.dimensions() == 1
    {
        return buffer.to_vec(value.py());
    }
    let list = if value.hasattr("tolist")? { value.call_method0("tolist")? } else { value.clone() };
    list.try_iter()?.map(|item| id(&item?)).collect()
}

pub fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| Error::file(path, error))
}

/// The next texts, at most `most`; none at the end.
pub fn buffered(iterator: &mut Bound<'_, PyIterator>, most: usize) -> PyResult<Vec<Text>> {
    let (mut texts, mut size) = (Vec::new(), 0);
    while texts.len() < most && size < BUFFER_BYTES {
        let Some(text) = iterator.next() else { break };
        let text = Text::new(&text?)?;
        size += text.as_str()?.len();
        texts.push(text);
    }
    Ok(texts)
}
