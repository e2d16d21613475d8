//! The one lexer of the crate. It splits SQL text into tokens, without white space and comments.

use crate::kind::DatabaseKind;

/// One token of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Token<'t> {
    /// An unquoted word or a number.
    Word(&'t str),
    /// The text between the quotes of a name.
    QuotedName(&'t str),
    /// The text between the quotes of a string.
    StringLiteral(&'t str),
    /// The text between PostgreSQL's dollar quotes.
    DollarQuoted(&'t str),
    Symbol(char),
}

impl Token<'_> {
    /// Whether the token is this word, in upper or lower case.
    pub(super) fn is(&self, wanted: &str) -> bool {
        matches!(self, Self::Word(word) if word.eq_ignore_ascii_case(wanted))
    }
}

/// All tokens of `text`.
pub(super) fn tokens(text: &str, kind: DatabaseKind, settings: LexerSettings) -> Vec<Token<'_>> {
    Lexer::with_settings(text, kind, settings).map(|(token, ..)| token).collect()
}

/// Whether the statement is `ROLLBACK TO ..`, `ROLLBACK TRANSACTION TO ..` or `ROLLBACK WORK TO ..`.
pub(super) fn is_back_to_savepoint(statement: &[Token<'_>]) -> bool {
    let mut words = statement.iter();
    words.next().is_some_and(|token| token.is("ROLLBACK")) && words.take(2).any(|token| token.is("TO"))
}

/// The tokens outside of parentheses, with their indices.
pub(super) fn outside_parentheses<'s, 't>(tokens: &'s [Token<'t>]) -> impl Iterator<Item = (usize, &'s Token<'t>)> {
    let mut depth = 0_usize;
    tokens.iter().enumerate().filter(move |(_, token)| {
        match token {
            Token::Symbol('(') => depth += 1,
            Token::Symbol(')') => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0
    })
}

/// The settings and the version of a server that change how it reads SQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct LexerSettings {
    /// Whether a backslash escapes the next character of a plain string.
    backslash_escapes: bool,
    /// MySQL and MariaDB: `"` quotes a name (`ANSI_QUOTES`).
    ansi_quotes: bool,
    /// PostgreSQL before 16: `0x1F` and `1_000` are a number followed by a name.
    old_numbers: bool,
}

impl LexerSettings {
    /// The default settings of a server of this kind.
    pub(super) fn defaults(kind: DatabaseKind) -> Self {
        Self { backslash_escapes: kind == DatabaseKind::Mysql, ..Self::default() }
    }

    /// All settings with which a server of this kind may read `text`, the defaults first. A raw statement may have
    /// changed the settings. Settings that do not change the meaning of `text` are left out.
    pub(super) fn possible(text: &str, kind: DatabaseKind) -> impl Iterator<Item = Self> + use<> {
        let defaults = Self::defaults(kind);
        let has_backslash = kind != DatabaseKind::Sqlite && text.contains('\\');
        let has_quote = kind == DatabaseKind::Mysql && text.contains('"');
        let has_number =
            kind == DatabaseKind::Postgres && text.contains('$') && text.contains(|c: char| c.is_ascii_digit());
        let combinations = (0..8_u8).map(move |bits| Self {
            backslash_escapes: defaults.backslash_escapes ^ (bits & 1 != 0),
            ansi_quotes: bits & 2 != 0,
            old_numbers: bits & 4 != 0,
        });
        combinations.filter(move |settings| {
            (has_backslash || !settings.has_unusual_backslash(kind))
                && (has_quote || !settings.ansi_quotes)
                && (has_number || !settings.old_numbers)
        })
    }

    /// Whether the meaning of a backslash differs from the default.
    pub(super) fn has_unusual_backslash(self, kind: DatabaseKind) -> bool {
        self.backslash_escapes != Self::defaults(kind).backslash_escapes
    }
}

/// An iterator over the tokens of `text`, each with the index of its first byte and the index behind its last byte.
pub(crate) struct Lexer<'t> {
    text: &'t str,
    position: usize,
    kind: DatabaseKind,
    settings: LexerSettings,
    /// The index behind PostgreSQL's `E`: a string that begins there has backslash escapes.
    escape_string_at: Option<usize>,
    /// Whether the lexer is inside a comment that MySQL executes.
    in_executed_comment: bool,
}

/// No server of MySQL or MariaDB has this version yet, so no server executes a comment for it. `mariadb-dump` writes
/// such comments.
const FUTURE_VERSION: u32 = 999_999;

impl<'t> Lexer<'t> {
    /// Reads `text` with the default settings of the server.
    pub(crate) fn new(text: &'t str, kind: DatabaseKind) -> Self {
        Self::with_settings(text, kind, LexerSettings::defaults(kind))
    }

    pub(super) fn with_settings(text: &'t str, kind: DatabaseKind, settings: LexerSettings) -> Self {
        Self { text, position: 0, kind, settings, escape_string_at: None, in_executed_comment: false }
    }

    fn kind(&self) -> DatabaseKind {
        self.kind.known()
    }

    /// The text behind a comment that begins at the current position. The contents of a comment that MySQL executes
    /// count as code.
    fn after_comment(&mut self) -> Option<&'t str> {
        let rest = &self.text[self.position..];
        let mysql = self.kind() == DatabaseKind::Mysql;
        let ends: &[char] = if self.kind() == DatabaseKind::Postgres { &['\n', '\r'] } else { &['\n'] };
        let line = |comment: &'t str| comment.find(ends).map_or("", |end| &comment[end + 1..]);
        if let Some(comment) = rest.strip_prefix("--") {
            let is_comment =
                !mysql || comment.chars().next().is_none_or(|c| c.is_ascii_whitespace() || c.is_ascii_control());
            return is_comment.then(|| line(comment));
        }
        if let Some(comment) = rest.strip_prefix('#').filter(|_| mysql) {
            return Some(line(comment));
        }
        if let Some(after) = rest.strip_prefix("*/").filter(|_| self.in_executed_comment) {
            self.in_executed_comment = false;
            return Some(after);
        }
        let comment = rest.strip_prefix("/*")?;
        if let Some(executed) = comment.strip_prefix('!').or(comment.strip_prefix("M!")).filter(|_| mysql) {
            let statement = executed.trim_start_matches(|c: char| c.is_ascii_digit());
            let version = &executed[..executed.len() - statement.len()];
            if version.parse::<u32>().is_ok_and(|version| version < FUTURE_VERSION) || version.is_empty() {
                self.in_executed_comment = true;
                return Some(statement);
            }
        }
        let after = match self.kind() {
            DatabaseKind::Postgres => after_nested(rest),
            DatabaseKind::Mysql | DatabaseKind::Sqlite => comment.split_once("*/").map(|(_, after)| after),
        };
        Some(after.unwrap_or(""))
    }

    /// The text up to the next `close`, and the text behind it. A doubled `close` stands for one character and ends
    /// nothing. If the text has escapes, a backslash escapes the next character, and PostgreSQL continues a string on
    /// the next line.
    fn until(&mut self, inside: &'t str, close: char, has_escapes: bool) -> (&'t str, &'t str) {
        let mut position = 0;
        while let Some(found) = inside[position..].find(|c| c == close || c == '\\' && has_escapes) {
            let (before, rest) = inside.split_at(position + found);
            let after = &rest[1..];
            let continued = continued(after).filter(|_| has_escapes && self.kind() == DatabaseKind::Postgres);
            let more = match continued {
                _ if !rest.starts_with(close) => after.get(after.chars().next().map_or(0, char::len_utf8)..),
                None if close != ']' => after.strip_prefix(close),
                more => more,
            };
            let Some(more) = more else { return (before, after) };
            position = inside.len() - more.len();
        }
        (inside, "")
    }

    /// The length of PostgreSQL's number or word at the start of `rest`. A word may contain dollar signs, a number may
    /// not.
    fn postgres_word_end(&self, rest: &str) -> usize {
        let end = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
        if is_number(&rest[..end], self.settings.old_numbers) {
            return end;
        }
        rest.find(|c: char| !is_word(c) && c != '$').unwrap_or(rest.len())
    }
}

/// The text behind the opening quote of a string that continues the previous one on another line, as PostgreSQL joins
/// them.
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

/// Whether the whole of `word` is a number of PostgreSQL.
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

/// The length of a parameter of SQLite in the notation of Tcl: `$name::more(anything)`.
fn sqlite_parameter_end(rest: &str) -> usize {
    let mut has_name = false;
    let mut length = 1;
    while let Some(c) = rest[length..].chars().next() {
        if is_word(c) || c == '$' {
            has_name = true;
            length += c.len_utf8();
        } else if rest[length..].starts_with("::") {
            length += 2;
        } else if c == '(' && has_name {
            let inside = &rest[length + 1..];
            let end = inside.find(|c: char| c == ')' || c.is_ascii_whitespace() || c == '\x0b').unwrap_or(inside.len());
            return length + 1 + end + usize::from(inside[end..].starts_with(')'));
        } else {
            break;
        }
    }
    length
}

pub(super) fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || !c.is_ascii() && c != '\u{feff}'
}

impl<'t> Iterator for Lexer<'t> {
    type Item = (Token<'t>, usize, usize);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let is_blank = |c: char| c.is_ascii_whitespace() || matches!(c, '\x0b' | '\u{feff}');
            let rest = self.text[self.position..].trim_start_matches(is_blank);
            self.position = self.text.len() - rest.len();
            match self.after_comment() {
                Some(after) => self.position = self.text.len() - after.len(),
                None => break,
            }
        }
        let (start, rest) = (self.position, &self.text[self.position..]);
        let c = rest.chars().next()?;
        let behind = &rest[c.len_utf8()..];
        let [postgres, mysql, sqlite] =
            [DatabaseKind::Postgres, DatabaseKind::Mysql, DatabaseKind::Sqlite].map(|kind| self.kind() == kind);
        let is_string = c == '\'' || c == '"' && mysql && !self.settings.ansi_quotes;
        let is_name = c == '"' || c == '`' && !postgres || c == '[' && sqlite;
        let has_escapes = self.settings.backslash_escapes || self.escape_string_at == Some(start);
        let (token, after) = match c {
            _ if is_string => {
                let (inside, after) = self.until(behind, c, has_escapes);
                (Token::StringLiteral(inside), after)
            }
            _ if is_name => {
                let (inside, after) = self.until(behind, if c == '[' { ']' } else { c }, false);
                (Token::QuotedName(inside), after)
            }
            '$' if postgres => match behind.split_once('$') {
                Some((tag, body)) if tag.chars().all(is_word) && !tag.starts_with(|c: char| c.is_ascii_digit()) => {
                    let closed = body.split_once(&*format!("${tag}$"));
                    let (body, after) = closed.unwrap_or((body, ""));
                    (Token::DollarQuoted(body), after)
                }
                _ => (Token::Symbol(c), behind),
            },
            '$' | '@' | ':' | '#' if sqlite => {
                let (parameter, after) = rest.split_at(sqlite_parameter_end(rest));
                if parameter.len() == 1 { (Token::Symbol(c), after) } else { (Token::Word(parameter), after) }
            }
            c if is_word(c) => {
                let end = match postgres {
                    true => self.postgres_word_end(rest),
                    // A dollar sign in a word does not begin a quote.
                    false => rest.find(|c: char| !is_word(c) && c != '$').unwrap_or(rest.len()),
                };
                (Token::Word(&rest[..end]), &rest[end..])
            }
            c => (Token::Symbol(c), behind),
        };
        self.position = self.text.len() - after.len();
        let is_e = postgres && matches!(token, Token::Word("e" | "E"));
        self.escape_string_at = is_e.then_some(self.position);
        Some((token, start, self.position))
    }
}

/// The text behind a comment that may contain other comments.
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
    use super::{Lexer, Token};
    use crate::kind::DatabaseKind;

    fn tokens(text: &str, kind: DatabaseKind) -> Vec<Token<'_>> {
        Lexer::new(text, kind).map(|(token, ..)| token).collect()
    }

    #[test]
    fn lexer_follows_the_syntax_of_each_database() {
        use Token::{DollarQuoted, QuotedName, StringLiteral, Symbol, Word};
        assert_eq!(
            tokens("a.\"b\"\"c\" /* /* x */ y */ 'it''s' E'it\\'s' $1 $x$ ; $x$ -- z", DatabaseKind::Postgres),
            [
                Word("a"),
                Symbol('.'),
                QuotedName("b\"\"c"),
                StringLiteral("it''s"),
                Word("E"),
                StringLiteral("it\\'s"),
                Symbol('$'),
                Word("1"),
                DollarQuoted(" ; ")
            ]
        );
        assert_eq!(
            tokens("`a` \"b\\\"\" 'c\\\\' # 'd\n--e", DatabaseKind::Mysql),
            [QuotedName("a"), StringLiteral("b\\\""), StringLiteral("c\\\\"), Symbol('-'), Symbol('-'), Word("e")]
        );
        assert_eq!(tokens("/*!50000 SET */ /* x */", DatabaseKind::Mysql), [Word("SET")]);
        assert_eq!(tokens("/*! */ 2 */ 3", DatabaseKind::Mysql), [Word("2"), Symbol('*'), Symbol('/'), Word("3")]);
        assert_eq!(tokens("/*!999999\\- a */ /*M!999999 DROP */ b", DatabaseKind::Mysql), [Word("b")]);
        assert_eq!(
            tokens("[a] 'b\\' /* /* */ c$", DatabaseKind::Sqlite),
            [QuotedName("a"), StringLiteral("b\\"), Word("c$")]
        );
    }

    #[test]
    fn lexer_reads_an_unterminated_quote_or_comment_to_the_end() {
        use Token::{DollarQuoted, QuotedName, StringLiteral};
        for (text, token) in [
            ("'a", Some(StringLiteral("a"))),
            ("\"a", Some(QuotedName("a"))),
            ("$x$ a", Some(DollarQuoted(" a"))),
            ("/* /* */", None),
        ] {
            assert_eq!(tokens(text, DatabaseKind::Postgres), Vec::from_iter(token), "{text}");
        }
    }
}
