//! Names and ids.

use std::fmt;
use std::io;
use std::str::FromStr;

use rustix::rand::{GetRandomFlags, getrandom};

/// Bytes that a name has at most.
const MAX: usize = 63;

/// A VM's name: 1 to 63 letters, digits, `-`, `_` and `.`, the first a letter or a digit. So it is a host name, nearly, and
/// the name of a directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

/// Not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a name; names have 1 to {MAX} letters, digits, '-', '_' and '.', and begin with a letter or digit"
)]
pub struct NameError;

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// One by chance, easy to say.
    pub fn random() -> io::Result<Name> {
        let [a, b, c, ..] = random()?;
        let pick = |words: &[&'static str], by: u8| words[usize::from(by) % words.len()];
        let (quality, animal) = (pick(&QUALITIES, a), pick(&ANIMALS, b));
        Ok(Name(format!("{quality}-{animal}-{c}")))
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Name, NameError> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        let first = text
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric());
        match first && text.len() <= MAX && text.bytes().all(legal) {
            true => Ok(Name(text.into())),
            false => Err(NameError),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A VM's id: 12 hexadecimal digits, by chance.
pub fn new_id() -> io::Result<String> {
    let bytes = random()?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

fn random() -> io::Result<[u8; 6]> {
    let mut bytes = [0; 6];
    // So few bytes come at once or not at all (getrandom(2)).
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(bytes)
}

const QUALITIES: [&str; 24] = [
    "able", "bold", "brave", "brisk", "calm", "clear", "cosy", "deft", "eager", "fair", "fond",
    "glad", "keen", "kind", "light", "merry", "neat", "proud", "quick", "quiet", "still", "swift",
    "warm", "wise",
];

const ANIMALS: [&str; 24] = [
    "badger", "bee", "crane", "deer", "finch", "fox", "hare", "heron", "ibis", "jay", "lark",
    "lynx", "mole", "newt", "otter", "owl", "raven", "robin", "seal", "stork", "swan", "tern",
    "trout", "wren",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let long = "x".repeat(MAX);
        for good in ["web", "0", "a.b-c_D9", &long] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
        let longer = "x".repeat(MAX + 1);
        for bad in ["", ".", "..", "-x", "a/b", "a b", "ä", "a\n", &longer] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
        for _ in 0..100 {
            let name = Name::random().unwrap();
            assert_eq!(name.as_str().parse(), Ok(name));
            assert_eq!(new_id().unwrap().len(), 12);
        }
    }
}
