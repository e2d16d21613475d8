//! What a driver, a server or a hook said, worded as a part of a text of ours.

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// On one line, without the full stop: more follows. What would change how a terminal or a log shows it is written out.
pub(crate) fn phrase(said: impl Display) -> String {
    let said = said.to_string();
    let line = said.split_whitespace().collect::<Vec<_>>().join(" ");
    visible(line.trim_end_matches('.'))
}

/// Writes one line to the log, whatever its parts hold: text of a migration, a panic or a server may have line breaks.
macro_rules! log_line {
    ($level:ident, $target:literal, $($text:tt)+) => {
        $crate::wording::log_safely(|| {
            log::$level!(target: $target, "{}", $crate::wording::phrase(format_args!($($text)+)));
        })
    };
}
pub(crate) use log_line;

/// Calls the program's logger. A panic of it, as of one that writes to a closed pipe, must not end what the library was doing.
pub(crate) fn log_safely(log: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(log)) {
        // Its drop may panic again.
        std::mem::forget(panic);
    }
}

/// A name on one line, cut where it is longer than a name.
pub(crate) fn name(name: &str) -> String {
    const LONGEST: usize = 100;
    match name.char_indices().nth(LONGEST) {
        Some((end, _)) => visible(&name[..end]) + "..",
        None => visible(name),
    }
}

/// Whether a character ends a line, moves a cursor, or hides or turns round what is beside it.
pub(crate) fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// `text` with escapes for characters that end a line, move a cursor, or hide or reverse their neighbours.
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

/// On one line, as a sentence of its own.
pub(crate) fn sentence(said: impl Display) -> String {
    let mut line = phrase(said);
    if !line.ends_with(['?', '!']) {
        line.push('.');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_one() {
        assert_eq!(phrase("refused\n\tIs it running?\n"), "refused Is it running?");
        assert_eq!(phrase(" lost\r\n\r\n at once.\n"), "lost at once");
    }

    #[test]
    fn nothing_forges_a_line() {
        assert_eq!(phrase("a\n[ERROR] b\u{1b}[31m c\u{2028}d\u{202e}e"), "a [ERROR] b\\u{1b}[31m c d\\u{202e}e");
        assert_eq!(name("a\nb"), "a\\nb");
        assert_eq!(name(&"x".repeat(10_000)), "x".repeat(100) + "..");
    }

    #[test]
    fn a_sentence_ends_once() {
        assert_eq!(sentence("refused"), "refused.");
        assert_eq!(sentence("refused.\n"), "refused.");
        assert_eq!(sentence("is it\n running?\n"), "is it running?");
        assert_eq!(sentence("no!"), "no!");
    }
}
