//! SQL text as the parts it consists of, without white space and comments. This is the one lexer of the crate: whatever has to know
//! what stands in a text asks it.

use crate::kind::DatabaseKind;

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

/// The settings of a server by which it reads SQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Dialect {
    /// Whether a backslash in a plain string takes the next character's meaning away.
    backslash: bool,
    /// MySQL and MariaDB: `"` quotes a name (`ANSI_QUOTES`).
    ansi_quotes: bool,
    /// PostgreSQL before 16: `0x1F` and `1_000` are a number and the name that follows it.
    old_numbers: bool,
}

impl Dialect {
    /// What a server does whose settings are the usual ones.
    fn usual(kind: DatabaseKind) -> Self {
        Self { backslash: kind == DatabaseKind::Mysql, ..Self::default() }
    }

    /// All dialects in which a server of this kind may read `text`, the usual one first. A raw statement may have changed the settings.
    pub(super) fn possible(text: &str, kind: DatabaseKind) -> impl Iterator<Item = Self> + use<> {
        let usual = Self::usual(kind);
        let flips = |flip: bool| if flip { &[false, true][..] } else { &[false][..] };
        let backslash = kind != DatabaseKind::Sqlite && text.contains('\\');
        let ansi_quotes = kind == DatabaseKind::Mysql && text.contains('"');
        let old_numbers =
            kind == DatabaseKind::Postgres && text.contains('$') && text.contains(|c: char| c.is_ascii_digit());
        flips(old_numbers).iter().flat_map(move |&old_numbers| {
            flips(ansi_quotes).iter().flat_map(move |&ansi_quotes| {
                flips(backslash).iter().map(move |&flip| Self {
                    backslash: usual.backslash ^ flip,
                    ansi_quotes,
                    old_numbers,
                })
            })
        })
    }

    /// Whether a backslash means something else than it usually does.
    pub(super) fn has_unusual_backslash(self, kind: DatabaseKind) -> bool {
        self.backslash != Self::usual(kind).backslash
    }
}

/// The parts of `text`, each with the place where it begins and where it ends.
pub(crate) struct Parts<'t> {
    text: &'t str,
    at: usize,
    kind: DatabaseKind,
    dialect: Dialect,
    /// Where PostgreSQL's `E` ended: a string that begins there has escapes.
    escapes_at: Option<usize>,
    /// Inside of a comment that MySQL executes.
    executed: bool,
    open: bool,
}

/// No server of MySQL or MariaDB has this version yet, so none executes a comment for it; `mariadb-dump` writes some.
const NO_VERSION: u32 = 999_999;

impl<'t> Parts<'t> {
    /// As a server reads it whose settings are the usual ones.
    pub(crate) fn of(text: &'t str, kind: DatabaseKind) -> Self {
        Self::read(text, kind, Dialect::usual(kind))
    }

    pub(super) fn read(text: &'t str, kind: DatabaseKind, dialect: Dialect) -> Self {
        Self { text, at: 0, kind, dialect, escapes_at: None, executed: false, open: false }
    }

    /// Whether a quote or a comment that was met has no end: what is put behind the text would be in it.
    pub(crate) fn is_open(&self) -> bool {
        self.open
    }

    /// What is behind a comment that begins here. What MySQL executes of a comment counts as not being in one.
    fn after_comment(&mut self) -> Option<&'t str> {
        let rest = &self.text[self.at..];
        let mysql = self.kind == DatabaseKind::Mysql;
        let ends: &[char] = if self.kind == DatabaseKind::Postgres { &['\n', '\r'] } else { &['\n'] };
        let line = |comment: &'t str| comment.find(ends).map_or("", |end| &comment[end + 1..]);
        if let Some(comment) = rest.strip_prefix("--") {
            let is_one =
                !mysql || comment.chars().next().is_none_or(|c| c.is_ascii_whitespace() || c.is_ascii_control());
            return is_one.then(|| line(comment));
        }
        if let Some(comment) = rest.strip_prefix('#').filter(|_| mysql) {
            return Some(line(comment));
        }
        if let Some(after) = rest.strip_prefix("*/").filter(|_| self.executed) {
            self.executed = false;
            return Some(after);
        }
        let comment = rest.strip_prefix("/*")?;
        if let Some(executed) = comment.strip_prefix('!').or(comment.strip_prefix("M!")).filter(|_| mysql) {
            let statement = executed.trim_start_matches(|c: char| c.is_ascii_digit());
            let version = &executed[..executed.len() - statement.len()];
            if version.parse::<u32>().is_ok_and(|version| version < NO_VERSION) || version.is_empty() {
                self.executed = true;
                return Some(statement);
            }
        }
        let after = match self.kind {
            DatabaseKind::Postgres => after_nested(rest),
            DatabaseKind::Mysql | DatabaseKind::Sqlite => comment.split_once("*/").map(|(_, after)| after),
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

    /// The same where a backslash takes the next character's meaning away. PostgreSQL goes on with a string of the next line.
    fn until_unescaped(&mut self, inside: &'t str, close: char) -> (&'t str, &'t str) {
        let mut chars = inside.char_indices();
        while let Some((end, c)) = chars.next() {
            if c == '\\' {
                chars.next();
            } else if c == close {
                let after = &inside[end + 1..];
                match continued(after).filter(|_| self.kind == DatabaseKind::Postgres) {
                    Some(more) => chars = more_indices(inside, more),
                    // Two quotes stand for one.
                    None if after.starts_with(close) => drop(chars.next()),
                    None => return (&inside[..end], after),
                }
            }
        }
        self.open = true;
        (inside, "")
    }

    /// PostgreSQL's number or word, of which a word may have dollar signs in it.
    fn postgres_word_end(&self, rest: &str) -> usize {
        let end = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
        if is_number(&rest[..end], self.dialect.old_numbers) {
            return end;
        }
        rest.find(|c: char| !is_word(c) && c != '$').unwrap_or(rest.len())
    }
}

/// What stands behind the quote of a string that goes on in another line, as PostgreSQL puts them together.
fn continued(after: &str) -> Option<&str> {
    let mut rest = after;
    let mut has_newline = false;
    loop {
        let trimmed = rest.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == '\x0b');
        has_newline |= rest[..rest.len() - trimmed.len()].contains(['\n', '\r']);
        match trimmed.strip_prefix("--") {
            Some(comment) => rest = &comment[comment.find(['\n', '\r'])?..],
            None => return trimmed.strip_prefix('\'').filter(|_| has_newline),
        }
    }
}

/// The characters of `more`, which is the end of `text`, with their places in that.
fn more_indices<'t>(text: &'t str, more: &'t str) -> std::str::CharIndices<'t> {
    let mut chars = text.char_indices();
    while chars.offset() < text.len() - more.len() {
        chars.next();
    }
    chars
}

/// Whether a word of PostgreSQL is a number as a whole.
fn is_number(word: &str, old_numbers: bool) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'_' && !old_numbers);
    if !word.starts_with(|c: char| c.is_ascii_digit()) {
        return false;
    }
    let is_radix = |prefix: [&str; 2]| prefix.iter().any(|prefix| word.starts_with(prefix));
    digits(word)
        || word.split_once(['e', 'E']).is_some_and(|(number, exponent)| digits(number) && digits(exponent))
        || !old_numbers
            && (is_radix(["0x", "0X"]) && word[2..].bytes().all(|b| b.is_ascii_hexdigit() || b == b'_')
                || is_radix(["0o", "0O"]) && digits(&word[2..])
                || is_radix(["0b", "0B"]) && digits(&word[2..]))
}

/// SQLite's parameter as Tcl writes it: `$name::more(anything)`.
fn sqlite_parameter_end(rest: &str) -> usize {
    let mut names = false;
    let mut at = 1;
    while let Some(c) = rest[at..].chars().next() {
        if is_word(c) || c == '$' {
            names = true;
            at += c.len_utf8();
        } else if rest[at..].starts_with("::") {
            at += 2;
        } else if c == '(' && names {
            let inside = &rest[at + 1..];
            let end = inside.find(|c: char| c == ')' || c.is_ascii_whitespace() || c == '\x0b').unwrap_or(inside.len());
            return at + 1 + end + usize::from(inside[end..].starts_with(')'));
        } else {
            break;
        }
    }
    at
}

pub(super) fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || !c.is_ascii() && c != '\u{feff}'
}

impl<'t> Iterator for Parts<'t> {
    type Item = (Part<'t>, usize, usize);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let is_blank = |c: char| c.is_ascii_whitespace() || matches!(c, '\x0b' | '\u{feff}');
            let rest = self.text[self.at..].trim_start_matches(is_blank);
            self.at = self.text.len() - rest.len();
            match self.after_comment() {
                Some(after) => self.at = self.text.len() - after.len(),
                None => break,
            }
        }
        let (from, rest) = (self.at, &self.text[self.at..]);
        let c = rest.chars().next()?;
        let behind = &rest[c.len_utf8()..];
        let (mysql, postgres) = (self.kind == DatabaseKind::Mysql, self.kind == DatabaseKind::Postgres);
        let is_text = c == '\'' || c == '"' && mysql && !self.dialect.ansi_quotes;
        let has_escapes = self.dialect.backslash || self.escapes_at == Some(from);
        let (part, after) = match c {
            _ if is_text => {
                let (inside, after) = if has_escapes { self.until_unescaped(behind, c) } else { self.until(behind, c) };
                (Part::Text(inside), after)
            }
            '"' => {
                let (inside, after) = self.until(behind, c);
                (Part::Name(inside), after)
            }
            '`' if !postgres => {
                let (inside, after) = self.until(behind, c);
                (Part::Name(inside), after)
            }
            '[' if self.kind == DatabaseKind::Sqlite => {
                let (inside, after) = self.until(behind, ']');
                (Part::Name(inside), after)
            }
            '$' if postgres => match behind.split_once('$') {
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
            '$' | '@' | ':' | '#' if self.kind == DatabaseKind::Sqlite => {
                let (parameter, after) = rest.split_at(sqlite_parameter_end(rest));
                if parameter.len() == 1 { (Part::Sign(c), after) } else { (Part::Word(parameter), after) }
            }
            c if is_word(c) => {
                let end = match postgres {
                    true => self.postgres_word_end(rest),
                    // A dollar sign in a word begins no quote.
                    false => rest.find(|c: char| !is_word(c) && c != '$').unwrap_or(rest.len()),
                };
                (Part::Word(&rest[..end]), &rest[end..])
            }
            c => (Part::Sign(c), behind),
        };
        self.at = self.text.len() - after.len();
        let is_e = postgres && matches!(part, Part::Word("e" | "E"));
        self.escapes_at = is_e.then_some(self.at);
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
    use super::{Part, Parts};
    use crate::kind::DatabaseKind;

    fn parts(text: &str, kind: DatabaseKind) -> Vec<Part<'_>> {
        Parts::of(text, kind).map(|(part, ..)| part).collect()
    }

    fn is_open(text: &str, kind: DatabaseKind) -> bool {
        let mut parts = Parts::of(text, kind);
        parts.by_ref().for_each(drop);
        parts.is_open()
    }

    #[test]
    fn each_kind_reads_its_own_way() {
        use Part::{Body, Name, Sign, Text, Word};
        assert_eq!(
            parts("a.\"b\"\"c\" /* /* x */ y */ 'it''s' E'it\\'s' $1 $x$ ; $x$ -- z", DatabaseKind::Postgres),
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
            parts("`a` \"b\\\"\" 'c\\\\' # 'd\n--e", DatabaseKind::Mysql),
            [Name("a"), Text("b\\\""), Text("c\\\\"), Sign('-'), Sign('-'), Word("e")]
        );
        assert_eq!(parts("/*!50000 SET */ /* x */", DatabaseKind::Mysql), [Word("SET")]);
        assert_eq!(parts("/*! */ 2 */ 3", DatabaseKind::Mysql), [Word("2"), Sign('*'), Sign('/'), Word("3")]);
        assert_eq!(parts("/*!999999\\- a */ /*M!999999 DROP */ b", DatabaseKind::Mysql), [Word("b")]);
        assert_eq!(parts("[a] 'b\\' /* /* */ c$", DatabaseKind::Sqlite), [Name("a"), Text("b\\"), Word("c$")]);
    }

    #[test]
    fn what_has_no_end_is_open() {
        for text in ["'a", "\"a", "$x$ a", "/* /* */", "E'a\\'", "'a''"] {
            assert!(is_open(text, DatabaseKind::Postgres), "{text}");
        }
        for text in ["'a\\'", "\"a", "`a", "/* a", "'"] {
            assert!(is_open(text, DatabaseKind::Mysql), "{text}");
        }
        for text in ["'a'", "''", "'a\\\\'", "'é'", "-- a", "/* */", ""] {
            for kind in [DatabaseKind::Postgres, DatabaseKind::Mysql, DatabaseKind::Sqlite] {
                assert!(!is_open(text, kind), "{text}");
            }
        }
    }
}
