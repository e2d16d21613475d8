//! SQLite's rules for the URI of a database file.

use crate::percent::decode_bytes;
use crate::redact::is_harmless;

/// A URI without its scheme `file:`.
pub(crate) struct SqliteUri<'u> {
    /// The URI without the scheme and the fragment.
    pub(crate) text: &'u str,
    /// The path as the URI spells it.
    pub(crate) encoded_path: &'u str,
    pub(crate) path: String,
    query: &'u str,
}

impl<'u> SqliteUri<'u> {
    /// Reads the text behind `file:`. The error is a reason that quotes nothing of the URI.
    pub(crate) fn parse(text: &'u str) -> Result<Self, &'static str> {
        let text = text.split('#').next().unwrap_or_default();
        let (name, query) = text.split_once('?').unwrap_or((text, ""));
        let encoded_path = match name.strip_prefix("//") {
            Some(rest) => {
                let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
                if !authority.is_empty() && authority != "localhost" {
                    return Err(
                        "SQLite takes no host in `file://host/path` but `localhost`; a file is file:/path or file:///path",
                    );
                }
                path
            }
            None => name,
        };
        Ok(Self { text, encoded_path, path: decode(encoded_path), query })
    }

    /// The value of a parameter. If the parameter occurs several times, the last value counts.
    fn parameter(&self, name: &str) -> Option<String> {
        self.pairs().rev().find(|(found, _)| decode(found) == name).map(|(_, value)| decode(value))
    }

    fn has(&self, name: &str, value: &str) -> bool {
        self.parameter(name).is_some_and(|found| found == value)
    }

    fn pairs(&self) -> impl DoubleEndedIterator<Item = (&'u str, &'u str)> {
        self.query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")))
    }

    /// The values of the parameters that may contain a password or a key, encoded and decoded.
    pub(crate) fn secrets(&self) -> impl Iterator<Item = String> {
        let secrets = self.pairs().filter(|(name, _)| !is_harmless(&decode(name)));
        // A value may decode to invalid UTF-8.
        secrets.flat_map(|(_, value)| [value.to_owned(), decode(value)])
    }

    /// Whether SQLite keeps the database in memory or in a temporary file.
    pub(crate) fn is_memory(&self) -> bool {
        self.path.is_empty() || self.path == ":memory:" || self.has("mode", "memory") || self.has("vfs", "memdb")
    }

    /// Whether the URI names an in-memory database that all connections of the process share. SQLite requires a path
    /// with a leading slash.
    pub(crate) fn is_shared_memory(&self) -> bool {
        self.has("vfs", "memdb") && self.path.starts_with('/')
    }

    pub(crate) fn is_read_only(&self) -> bool {
        let immutable = self.parameter("immutable").map(|value| value.to_ascii_lowercase());
        let is_true = |value: &str| ["yes", "true", "on"].contains(&value) || value.parse().is_ok_and(|n: i64| n != 0);
        self.has("mode", "ro") || immutable.is_some_and(|value| is_true(&value))
    }
}

/// Decodes percent-encoding as SQLite does. An encoded NUL ends the text.
fn decode(text: &str) -> String {
    let bytes = decode_bytes(text);
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sqlite_uri_uses_the_last_value_of_a_parameter() {
        let uri = SqliteUri::parse("/srv/a?mode=memory&mode=ro#mode=rwc").expect("no host");
        assert!(!uri.is_memory() && uri.is_read_only());
        assert_eq!((uri.text, uri.path.as_str()), ("/srv/a?mode=memory&mode=ro", "/srv/a"));
    }

    #[test]
    fn sqlite_uri_decodes_like_sqlite() {
        assert_eq!(decode("a%20b%3fc"), "a b?c");
        assert_eq!(decode("100%"), "100%");
        assert_eq!(decode("a%00b"), "a");
    }
}
