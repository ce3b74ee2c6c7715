//! Byte-pair encoding: a trainer and an encoder.
//!
//! - `unicode`, `split`: texts into chunks, which no merge crosses
//! - `words`, `train`: counts of distinct chunks, then merges of the most frequent pair
//! - `vocab`, `encode`, `bpe`: tokens, a chunk into tokens, the tokenizer with its special tokens
//! - `files`: saved tokenizers; tiktoken's, GPT-2's and Hugging Face's formats
//! - `parallel`, `error`: threads that can be stopped; one line for each thing that goes wrong
//! - `py`: the Python module, with the feature "python"

#![deny(unsafe_code)]

pub mod bpe;
mod encode;
pub mod error;
pub mod files;
pub mod parallel;
#[cfg(feature = "python")]
mod py;
pub mod split;
pub mod train;
mod unicode;
pub mod vocab;
mod words;
