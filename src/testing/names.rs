//! The names of the databases and schemas that are made for tests.
//!
//! A name says whose it is, and ends in a check of the rest. So it is marked in the same moment in which it is made, on every kind of
//! database, and nothing that somebody else has named is ever taken for one of these. It is far shorter than any database's
//! limit, whatever the test is called.

use std::fmt;

use crate::dialect::fnv1a;

/// What all of them start with.
pub(super) const PREFIX: &str = "diesel_session_";

/// The name of something that was made for tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Name {
    /// One test's; removed at its end, or when its owner is dead.
    Test { owner: u32, number: u32 },
    /// Holds a schema and fixtures, and is copied; kept.
    Template { content: u64 },
    /// The same, in which tests run that are rolled back; kept.
    Rollback { content: u64, number: u32 },
}

impl Name {
    /// What `text` names, if it is one of these.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut words = text.strip_prefix(PREFIX)?.split('_');
        let kind = words.next()?;
        let first = words.next()?;
        let name = match kind {
            "test" => Self::Test { owner: u32::from_str_radix(first, 16).ok()?, number: words.next()?.parse().ok()? },
            "template" => Self::Template { content: u64::from_str_radix(first, 16).ok()? },
            "rollback" => {
                Self::Rollback { content: u64::from_str_radix(first, 16).ok()?, number: words.next()?.parse().ok()? }
            }
            _ => return None,
        };
        (name.to_string() == text).then_some(name)
    }

    /// Whether it outlives the tests.
    pub(super) fn is_kept(self) -> bool {
        !matches!(self, Self::Test { .. })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Test { owner, number } => format!("{PREFIX}test_{owner:08x}_{number}"),
            Self::Template { content } => format!("{PREFIX}template_{content:016x}"),
            Self::Rollback { content, number } => format!("{PREFIX}rollback_{content:016x}_{number}"),
        };
        let check = fnv1a([text.as_bytes(), b"made for a test"]);
        write!(f, "{text}_{:08x}", (check ^ (check >> 32)) as u32)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_is_known_again() {
        for name in [
            Name::Test { owner: 7, number: 0 },
            Name::Test { owner: u32::MAX, number: u32::MAX },
            Name::Template { content: 0 },
            Name::Rollback { content: u64::MAX, number: u32::MAX },
        ] {
            let text = name.to_string();
            assert_eq!(Name::parse(&text), Some(name));
            assert!(text.len() <= 63, "{text}");
        }
    }

    #[test]
    fn what_somebody_else_has_named_is_not() {
        let text = Name::Test { owner: 7, number: 1 }.to_string();
        let last = if text.ends_with('0') { '1' } else { '0' };
        let forged = format!("{}{last}", &text[..text.len() - 1]);
        for other in ["", "shop", "diesel_session_", "diesel_session_test", "diesel_session_test_7_1", &forged] {
            assert_eq!(Name::parse(other), None, "{other}");
        }
        assert_eq!(Name::parse(&format!("{text}_")), None);
        assert_eq!(Name::parse(&text.to_uppercase()), None);
    }

    proptest! {
        #[test]
        fn nothing_that_is_read_is_read_as_another(text in "diesel_session_(test|rollback|template)_[0-9a-f]{1,9}(_[0-9]{1,3})?_[0-9a-f]{8}") {
            if let Some(name) = Name::parse(&text) {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}
