//! What a driver, a server or a hook said, worded as a part of a text of ours.

use std::fmt::Display;

/// On one line, without the full stop: more follows.
pub(crate) fn phrase(said: impl Display) -> String {
    let said = said.to_string();
    let line = said.split_whitespace().collect::<Vec<_>>().join(" ");
    line.trim_end_matches('.').to_owned()
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
    fn a_sentence_ends_once() {
        assert_eq!(sentence("refused"), "refused.");
        assert_eq!(sentence("refused.\n"), "refused.");
        assert_eq!(sentence("is it\n running?\n"), "is it running?");
        assert_eq!(sentence("no!"), "no!");
    }
}
