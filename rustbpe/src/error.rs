//! The errors of this crate. Each displays as one line.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug)]
pub enum Error {
    /// An argument, a pattern or a file's content that cannot be used.
    Value(String),
    File(PathBuf, io::Error),
    /// The caller's watch asked to stop; the reason is the caller's.
    Stopped,
    /// A fault of ours.
    Internal(String),
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn value(message: impl Into<String>) -> Self {
        Self::Value(message.into())
    }

    pub fn file(path: &Path, error: io::Error) -> Self {
        Self::File(path.to_owned(), error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value(message) => f.write_str(message),
            Self::File(path, error) => write!(f, "{}: {error}", path.display()),
            Self::Stopped => f.write_str("stopped"),
            Self::Internal(message) => write!(f, "a fault in rustbpe: {message}"),
        }
    }
}

impl std::error::Error for Error {}
