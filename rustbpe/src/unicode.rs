//! What the split patterns ask of a character, from the tables that the regex engine itself uses.

use std::sync::LazyLock;

use regex_syntax::hir::{Class as HirClass, HirKind};

pub const OTHER: u8 = 0;
/// `\p{L}`
pub const LETTER: u8 = 1;
/// `\p{N}`
pub const NUMBER: u8 = 2;
/// `\s` but for the two below
pub const SPACE: u8 = 3;
/// `\r` and `\n`
pub const NEWLINE: u8 = 4;

const BLOCK: usize = 128;

/// The class of each character: one byte in a block of 128, equal blocks kept once.
pub struct Classes {
    pub ascii: [u8; BLOCK],
    block_of: Vec<u16>,
    blocks: Vec<[u8; BLOCK]>,
}

static CLASSES: LazyLock<Classes> = LazyLock::new(Classes::build);

impl Classes {
    pub fn get() -> &'static Self {
        &CLASSES
    }

    fn build() -> Self {
        let mut flat = vec![OTHER; char::MAX as usize + 1];
        for (pattern, class) in [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE), (r"[\r\n]", NEWLINE)] {
            let hir = regex_syntax::parse(pattern).expect("a constant pattern");
            if let HirKind::Class(HirClass::Unicode(set)) = hir.kind() {
                for range in set.ranges() {
                    flat[range.start() as usize..=range.end() as usize].fill(class);
                }
            }
        }
        let (mut blocks, mut block_of) = (Vec::<[u8; BLOCK]>::new(), Vec::new());
        for part in flat.as_chunks::<BLOCK>().0 {
            let at = blocks.iter().position(|block| block == part).unwrap_or_else(|| {
                blocks.push(*part);
                blocks.len() - 1
            });
            block_of.push(at as u16);
        }
        Self { ascii: blocks[usize::from(block_of[0])], block_of, blocks }
    }

    /// The class of the character that begins at `text[at]`, and its length in bytes. The text is valid UTF-8.
    #[inline(always)]
    pub fn at(&self, text: &[u8], at: usize) -> (u8, usize) {
        let byte = text[at];
        if byte < 128 { (self.ascii[usize::from(byte)], 1) } else { self.wide(text, at) }
    }

    fn wide(&self, text: &[u8], at: usize) -> (u8, usize) {
        let low = |offset: usize| u32::from(text[at + offset]) & 0x3f;
        let first = u32::from(text[at]);
        let (code, length) = match first {
            0..0xe0 => ((first & 0x1f) << 6 | low(1), 2),
            0xe0..0xf0 => ((first & 0x0f) << 12 | low(1) << 6 | low(2), 3),
            _ => ((first & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3), 4),
        };
        let code = code as usize;
        (self.blocks[usize::from(self.block_of[code / BLOCK])][code % BLOCK], length)
    }
}
