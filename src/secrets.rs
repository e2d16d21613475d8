//! What must not appear in any text: passwords, whole or in pieces.

use std::collections::BTreeSet;

/// A piece of a password that is no longer than this by chance stands in many words.
pub(crate) const PIECE: usize = 4;

/// Passwords in every form in which a driver may come by them.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Secrets {
    /// The longest first: another may be a part of it.
    whole: Vec<String>,
    pieces: BTreeSet<[u8; PIECE]>,
}

impl Secrets {
    pub(crate) fn new(forms: impl IntoIterator<Item = String>) -> Self {
        let mut whole: Vec<String> = forms.into_iter().filter(|form| !form.is_empty()).collect();
        whole.sort_by_key(|form| std::cmp::Reverse(form.len()));
        let windows = whole.iter().flat_map(|form| form.as_bytes().windows(PIECE));
        let pieces = windows.filter_map(|window| window.try_into().ok()).collect();
        Self { whole, pieces }
    }

    /// Whether a piece of one stands in `text`.
    pub(crate) fn are_in(&self, text: &str) -> bool {
        self.marks(text).contains(&true)
    }

    /// `text` without them, and without pieces of them: as text, and as lists of bytes.
    pub(crate) fn scrub(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in self.whole.iter().filter(|secret| secret.len() < PIECE) {
            text = text.replace(secret.as_str(), MASK);
        }
        let marks = self.marks(&text);
        let mut clean = String::with_capacity(text.len());
        let mut masked = false;
        for (at, c) in text.char_indices() {
            if !marks[at..at + c.len_utf8()].contains(&true) {
                clean.push(c);
                masked = false;
            } else if !std::mem::replace(&mut masked, true) {
                clean.push_str(MASK);
            }
        }
        clean
    }

    /// Which bytes of the text belong to a piece.
    fn marks(&self, text: &str) -> Vec<bool> {
        let mut marks = vec![false; text.len()];
        if self.pieces.is_empty() {
            return marks;
        }
        for (at, window) in text.as_bytes().windows(PIECE).enumerate() {
            if self.is_piece(window) {
                marks[at..at + PIECE].fill(true);
            }
        }
        for numbers in byte_lists(text) {
            for window in numbers.windows(PIECE) {
                let bytes: Vec<u8> = window.iter().map(|number| number.value).collect();
                if self.is_piece(&bytes) {
                    marks[window[0].start..window[PIECE - 1].end].fill(true);
                }
            }
        }
        marks
    }

    fn is_piece(&self, bytes: &[u8]) -> bool {
        <[u8; PIECE]>::try_from(bytes).is_ok_and(|bytes| self.pieces.contains(&bytes))
    }
}

/// What stands in their place.
pub(crate) const MASK: &str = "***";

/// Whether a parameter of that name is known to hold no password. One that nobody knows may be a slip.
pub(crate) fn is_harmless(name: &str) -> bool {
    const BEGINNINGS: &[&str] =
        &["keepalives", "gss", "krb", "load_balance", "require_", "ssl_", "sslc", "sslr", "sslmode"];
    const NAMES: &[&str] = &[
        "host",
        "hostaddr",
        "port",
        "dbname",
        "user",
        "passfile",
        "channel_binding",
        "connect_timeout",
        "client_encoding",
        "options",
        "application_name",
        "fallback_application_name",
        "tcp_user_timeout",
        "replication",
        "requiressl",
        "service",
        "target_session_attrs",
        "unix_socket",
        "mode",
        "cache",
        "psow",
        "nolock",
        "immutable",
        "vfs",
        "modeof",
    ];
    NAMES.contains(&name) || BEGINNINGS.iter().any(|beginning| name.starts_with(beginning))
}

/// A number from 0 to 255 in a text.
struct Number {
    value: u8,
    start: usize,
    end: usize,
}

/// Numbers that stand in a row, with commas between them, as Rust shows bytes.
fn byte_lists(text: &str) -> Vec<Vec<Number>> {
    let mut lists: Vec<Vec<Number>> = Vec::new();
    let is_digit = |c: char| c.is_ascii_digit();
    let mut at = 0;
    while let Some(start) = text[at..].find(is_digit).map(|found| at + found) {
        let end = text[start..].find(|c| !is_digit(c)).map_or(text.len(), |length| start + length);
        at = end;
        let Ok(value) = text[start..end].parse() else { continue };
        let number = Number { value, start, end };
        match lists.last_mut() {
            Some(list) if list.last().is_some_and(|last| text[last.end..start].trim() == ",") => list.push(number),
            _ => lists.push(vec![number]),
        }
    }
    lists
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrubbed(secret: &str, text: &str) -> String {
        Secrets::new([secret.to_owned()]).scrub(text)
    }

    #[test]
    fn pieces_are_masked() {
        assert_eq!(scrubbed("hunter2", "no hunter2, no unter, nter2x"), "no ***, no ***, ***x");
        assert_eq!(scrubbed("hunter2", "hun is no piece"), "hun is no piece");
        assert_eq!(scrubbed("pässwort", "ässw and swör"), "*** and swör");
        assert_eq!(scrubbed("abc", "xabcx"), "x***x");
        assert_eq!(scrubbed("", "nothing to hide"), "nothing to hide");
    }

    #[test]
    fn byte_lists_are_read() {
        assert_eq!(
            scrubbed("hunter2", "NulError(5, [47, 104, 117, 110, 116, 101, 114, 50, 0])"),
            "NulError(5, [47, ***, 0])"
        );
        assert_eq!(scrubbed("hunter2", "[104,117,110,116]"), "[***]");
        assert_eq!(scrubbed("hunter2", "104, 117, 110 and 116"), "104, 117, 110 and 116");
    }

    #[test]
    fn secrets_are_found() {
        let secrets = Secrets::new(["hunter2".to_owned()]);
        assert!(secrets.are_in("a hunter") && !secrets.are_in("a hun"));
    }
}
