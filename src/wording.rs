//! Texts of drivers, servers and programs, prepared for the crate's own messages.

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// `text` on one line, without a full stop at its end, so that it can be part of a sentence. Unprintable characters are
/// escaped. An error is shown with its causes, as `{:#}` shows it.
pub(crate) fn phrase(text: impl Display) -> String {
    let text = format!("{text:#}");
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    visible(line.trim_end_matches('.'))
}

/// Writes one line to the log, even if its parts, such as texts of a migration, a panic or a server, have line breaks.
macro_rules! log_line {
    ($level:ident, $target:literal, $($text:tt)+) => {
        $crate::wording::log_safely(|| {
            log::$level!(target: $target, "{}", $crate::wording::phrase(format_args!($($text)+)));
        })
    };
}
pub(crate) use log_line;

/// Calls the program's logger. A panic of it, as of one that writes to a closed pipe, must not end what the library was
/// doing.
pub(crate) fn log_safely(log: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(log)) {
        // Its drop may panic again.
        std::mem::forget(panic);
    }
}

/// `name` on one line, truncated if it is long.
pub(crate) fn name(name: &str) -> String {
    const LONGEST: usize = 100;
    match name.char_indices().nth(LONGEST) {
        Some((end, _)) => visible(&name[..end]) + "..",
        None => visible(name),
    }
}

/// Whether a character ends a line, moves the cursor, or hides or reverses its neighbours.
pub(crate) fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// `text` with escapes for the characters of [`is_unprintable`].
pub(crate) fn visible(text: &str) -> String {
    if !text.contains(is_unprintable) {
        return text.to_owned();
    }
    text.chars().fold(String::new(), |mut line, c| {
        match is_unprintable(c) {
            true => line.extend(c.escape_default()),
            false => line.push(c),
        }
        line
    })
}

/// `text` on one line, as a complete sentence.
pub(crate) fn sentence(text: impl Display) -> String {
    let mut line = phrase(text);
    if !line.ends_with(['?', '!']) {
        line.push('.');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phrase_joins_lines() {
        assert_eq!(phrase("refused\n\tIs it running?\n"), "refused Is it running?");
        assert_eq!(phrase(" lost\r\n\r\n at once.\n"), "lost at once");
    }

    #[test]
    fn phrase_and_name_escape_unprintable_characters() {
        assert_eq!(phrase("a\n[ERROR] b\u{1b}[31m c\u{2028}d\u{202e}e"), "a [ERROR] b\\u{1b}[31m c d\\u{202e}e");
        assert_eq!(name("a\nb"), "a\\nb");
        assert_eq!(name(&"x".repeat(10_000)), "x".repeat(100) + "..");
    }

    #[test]
    fn sentence_ends_with_one_punctuation_mark() {
        assert_eq!(sentence("refused"), "refused.");
        assert_eq!(sentence("refused.\n"), "refused.");
        assert_eq!(sentence("is it\n running?\n"), "is it running?");
        assert_eq!(sentence("no!"), "no!");
    }
}
