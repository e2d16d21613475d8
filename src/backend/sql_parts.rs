//! SQL text as the parts it consists of, without white space and comments.

use super::Kind;
use super::sql_text::{after_comment, after_escaped, is_escape_string, is_word};

/// One part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part<'t> {
    /// A word outside of quotes, a number among them.
    Word(&'t str),
    /// What stands between the quotes of a name.
    Name(&'t str),
    /// What stands between the quotes of a string.
    Text(&'t str),
    /// What stands between PostgreSQL's dollar quotes.
    Body(&'t str),
    Sign(char),
}

/// The parts of `text`, each with the place where it begins and where it ends.
pub(crate) struct Parts<'t> {
    text: &'t str,
    at: usize,
    kind: Kind,
    open: bool,
}

impl<'t> Parts<'t> {
    pub(crate) fn of(text: &'t str, kind: Kind) -> Self {
        Self { text, at: 0, kind, open: false }
    }

    /// Whether a quote or a comment that was met has no end: what is put behind the text would be in it.
    pub(crate) fn is_open(&self) -> bool {
        self.open
    }

    /// What is behind a comment that begins here.
    fn after_comment(&mut self) -> Option<&'t str> {
        let rest = &self.text[self.at..];
        let mysql = self.kind == Kind::Mysql;
        let after = after_comment(rest, mysql)?;
        if !rest.starts_with("/*") || mysql && (rest.starts_with("/*!") || rest.starts_with("/*M!")) {
            return Some(after);
        }
        let after = if self.kind == Kind::Postgres {
            after_nested(rest)
        } else {
            rest[2..].split_once("*/").map(|(_, after)| after)
        };
        self.open |= after.is_none();
        Some(after.unwrap_or(""))
    }

    /// What is between here and the next `close`, where two of them stand for one; and what is behind.
    fn until(&mut self, inside: &'t str, close: char) -> (&'t str, &'t str) {
        let mut from = 0;
        while let Some(found) = inside[from..].find(close) {
            let end = from + found;
            let after = &inside[end + 1..];
            if close == ']' || !after.starts_with(close) {
                return (&inside[..end], after);
            }
            from = end + 2;
        }
        self.open = true;
        (inside, "")
    }

    /// The same where a backslash takes the next character's meaning away.
    fn until_unescaped(&mut self, inside: &'t str, close: char) -> (&'t str, &'t str) {
        let after = after_escaped(inside, close);
        let taken = &inside[..inside.len() - after.len()];
        let backslashes = taken.strip_suffix(close).map_or(1, |text| text.len() - text.trim_end_matches('\\').len());
        if backslashes % 2 == 1 {
            self.open = true;
            return (taken, "");
        }
        (&taken[..taken.len() - 1], after)
    }
}

impl<'t> Iterator for Parts<'t> {
    type Item = (Part<'t>, usize, usize);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let rest = self.text[self.at..].trim_start_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
            self.at = self.text.len() - rest.len();
            match self.after_comment() {
                Some(after) => self.at = self.text.len() - after.len(),
                None => break,
            }
        }
        let (from, rest) = (self.at, &self.text[self.at..]);
        let c = rest.chars().next()?;
        let behind = &rest[c.len_utf8()..];
        let mysql = self.kind == Kind::Mysql;
        let (part, after) = match c {
            '\'' if mysql || self.kind == Kind::Postgres && is_escape_string(&self.text[..from]) => {
                let (inside, after) = self.until_unescaped(behind, c);
                (Part::Text(inside), after)
            }
            '"' if mysql => {
                let (inside, after) = self.until_unescaped(behind, c);
                (Part::Text(inside), after)
            }
            '\'' => {
                let (inside, after) = self.until(behind, c);
                (Part::Text(inside), after)
            }
            '"' => {
                let (inside, after) = self.until(behind, c);
                (Part::Name(inside), after)
            }
            '`' if self.kind != Kind::Postgres => {
                let (inside, after) = self.until(behind, c);
                (Part::Name(inside), after)
            }
            '[' if self.kind == Kind::Sqlite => {
                let (inside, after) = self.until(behind, ']');
                (Part::Name(inside), after)
            }
            '$' if self.kind == Kind::Postgres => match behind.split_once('$') {
                Some((tag, body)) if tag.chars().all(is_word) && !tag.starts_with(|c: char| c.is_ascii_digit()) => {
                    match body.split_once(&*format!("${tag}$")) {
                        Some((body, after)) => (Part::Body(body), after),
                        None => {
                            self.open = true;
                            (Part::Body(body), "")
                        }
                    }
                }
                _ => (Part::Sign(c), behind),
            },
            c if is_word(c) => {
                // A dollar sign in a word begins no quote.
                let end = rest.find(|c: char| !is_word(c) && c != '$').unwrap_or(rest.len());
                (Part::Word(&rest[..end]), &rest[end..])
            }
            c => (Part::Sign(c), behind),
        };
        self.at = self.text.len() - after.len();
        Some((part, from, self.at))
    }
}

/// What follows a comment that may have others in it.
fn after_nested(text: &str) -> Option<&str> {
    let (mut rest, mut depth) = (text, 0_usize);
    loop {
        let here = &rest[rest.find(['/', '*'])?..];
        if let Some(inner) = here.strip_prefix("/*") {
            depth += 1;
            rest = inner;
        } else if let Some(outer) = here.strip_prefix("*/") {
            depth -= 1;
            rest = outer;
            if depth == 0 {
                return Some(rest);
            }
        } else {
            rest = &here[1..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Kind, Part, Parts};

    fn parts(text: &str, kind: Kind) -> Vec<Part<'_>> {
        Parts::of(text, kind).map(|(part, ..)| part).collect()
    }

    fn is_open(text: &str, kind: Kind) -> bool {
        let mut parts = Parts::of(text, kind);
        parts.by_ref().for_each(drop);
        parts.is_open()
    }

    #[test]
    fn each_kind_reads_its_own_way() {
        use Part::{Body, Name, Sign, Text, Word};
        assert_eq!(
            parts("a.\"b\"\"c\" /* /* x */ y */ 'it''s' E'it\\'s' $1 $x$ ; $x$ -- z", Kind::Postgres),
            [
                Word("a"),
                Sign('.'),
                Name("b\"\"c"),
                Text("it''s"),
                Word("E"),
                Text("it\\'s"),
                Sign('$'),
                Word("1"),
                Body(" ; ")
            ]
        );
        assert_eq!(
            parts("`a` \"b\\\"\" 'c\\\\' # 'd\n--e", Kind::Mysql),
            [Name("a"), Text("b\\\""), Text("c\\\\"), Sign('-'), Sign('-'), Word("e")]
        );
        assert_eq!(parts("/*!50000 SET */ /* x */", Kind::Mysql), [Word("SET"), Sign('*'), Sign('/')]);
        assert_eq!(parts("[a] 'b\\' /* /* */ c$", Kind::Sqlite), [Name("a"), Text("b\\"), Word("c$")]);
    }

    #[test]
    fn what_has_no_end_is_open() {
        for text in ["'a", "\"a", "$x$ a", "/* /* */", "E'a\\'", "'a''"] {
            assert!(is_open(text, Kind::Postgres), "{text}");
        }
        for text in ["'a\\'", "\"a", "`a", "/* a", "'"] {
            assert!(is_open(text, Kind::Mysql), "{text}");
        }
        for text in ["'a'", "''", "'a\\\\'", "'é'", "-- a", "/* */", ""] {
            for kind in [Kind::Postgres, Kind::Mysql, Kind::Sqlite] {
                assert!(!is_open(text, kind), "{text}");
            }
        }
    }
}
