//! The names of the databases and schemas that the test kit creates.
//!
//! A name contains its owner and ends with a checksum. So the creation of a database also marks the database, in one
//! step and on every kind of database, and a name that somebody else has chosen is never mistaken for a generated one.
//! The length of a name does not depend on the name of the test, and is far below the limit of every database.

use std::fmt;

use crate::dialect::fnv1a;

/// The prefix of all generated names.
pub(crate) const PREFIX: &str = "diesel_session_";

/// The name of a database or schema that the test kit has created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum GeneratedName {
    /// The database or schema of one test. It is removed at the end of the test, or when its owner is dead.
    Test { owner: u32, number: u32 },
    /// A template, from which the databases of tests are copied. It is kept between runs.
    Template { contents_hash: u64 },
    /// A database in which tests run and are rolled back. It is kept between runs.
    Rollback { contents_hash: u64, number: u32 },
}

impl GeneratedName {
    /// Parses `text`. The result is `None` if `text` is not a generated name.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut words = text.strip_prefix(PREFIX)?.split('_');
        let kind = words.next()?;
        let first = words.next()?;
        let name = match kind {
            "test" => Self::Test { owner: u32::from_str_radix(first, 16).ok()?, number: words.next()?.parse().ok()? },
            "template" => Self::Template { contents_hash: u64::from_str_radix(first, 16).ok()? },
            "rollback" => Self::Rollback {
                contents_hash: u64::from_str_radix(first, 16).ok()?,
                number: words.next()?.parse().ok()?,
            },
            _ => return None,
        };
        (name.to_string() == text).then_some(name)
    }

    /// The hash of the contents of a database that is kept between runs.
    #[cfg(feature = "testing")]
    pub(crate) fn contents_hash(self) -> Option<u64> {
        match self {
            Self::Test { .. } => None,
            Self::Template { contents_hash } | Self::Rollback { contents_hash, .. } => Some(contents_hash),
        }
    }
}

impl fmt::Display for GeneratedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Test { owner, number } => format!("{PREFIX}test_{owner:08x}_{number}"),
            Self::Template { contents_hash } => format!("{PREFIX}template_{contents_hash:016x}"),
            Self::Rollback { contents_hash, number } => format!("{PREFIX}rollback_{contents_hash:016x}_{number}"),
        };
        let checksum = fnv1a([text.as_bytes(), b"made for a test"]);
        write!(f, "{text}_{:08x}", (checksum ^ (checksum >> 32)) as u32)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn generated_name_parses_its_own_text() {
        for name in [
            GeneratedName::Test { owner: 7, number: 0 },
            GeneratedName::Test { owner: u32::MAX, number: u32::MAX },
            GeneratedName::Template { contents_hash: 0 },
            GeneratedName::Rollback { contents_hash: u64::MAX, number: u32::MAX },
        ] {
            let text = name.to_string();
            assert_eq!(GeneratedName::parse(&text), Some(name));
            assert!(text.len() <= 63, "{text}");
        }
    }

    #[test]
    fn generated_name_refuses_other_names() {
        let text = GeneratedName::Test { owner: 7, number: 1 }.to_string();
        let last = if text.ends_with('0') { '1' } else { '0' };
        let forged = format!("{}{last}", &text[..text.len() - 1]);
        for other in ["", "shop", "diesel_session_", "diesel_session_test", "diesel_session_test_7_1", &forged] {
            assert_eq!(GeneratedName::parse(other), None, "{other}");
        }
        assert_eq!(GeneratedName::parse(&format!("{text}_")), None);
        assert_eq!(GeneratedName::parse(&text.to_uppercase()), None);
    }

    proptest! {
        #[test]
        fn parsed_name_displays_the_same_text(text in "diesel_session_(test|rollback|template)_[0-9a-f]{1,9}(_[0-9]{1,3})?_[0-9a-f]{8}") {
            if let Some(name) = GeneratedName::parse(&text) {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}
