//! The SQL of an application's migrations, which the library determines without a database.

use std::panic::{AssertUnwindSafe, catch_unwind};

use diesel::backend::Backend;
use diesel::migration::{CREATE_MIGRATIONS_TABLE, Migration};

use crate::app::App;
use crate::connection::SessionConnection;
use crate::dialect::lexer::{Lexer, Token};
use crate::error::{Error, Result};
use crate::kind::DatabaseKind;
use crate::migrations::RecordingConnection;

/// The migrations of an application for its kind of database, in the order of their versions.
#[derive(Debug)]
pub(crate) struct Script {
    steps: Vec<Step>,
    /// Whether there is a source of migrations for this kind. Without a source `create_all` creates nothing, not even
    /// its own table.
    has_source: bool,
}

/// One migration.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) version: String,
    pub(crate) name: String,
    /// `None` if the migration is opaque: it is code of the program, whose effect no SQL text describes.
    pub(crate) sql: Option<String>,
    pub(crate) in_transaction: bool,
}

impl<C: SessionConnection> App<C> {
    /// The SQL of the application's migrations. The function does not use the database.
    pub(crate) fn script(&self) -> Result<Script> {
        let known = match self.known_migrations() {
            Err(Error::NoMigrations { .. }) => return Ok(Script { steps: Vec::new(), has_source: false }),
            known => known?,
        };
        let kind = self.options().target.kind;
        let steps = known.into_iter().map(|known| Step {
            sql: recorded_sql(&*known.migration, kind),
            version: known.version,
            name: known.name,
            in_transaction: known.in_transaction,
        });
        Ok(Script { steps: steps.collect(), has_source: true })
    }
}

impl Script {
    /// The messages that create on an empty database the same schema as `create_all`. The caller sends each message
    /// separately, outside a transaction: the transaction settings of a migration must not reach the next one, and
    /// PostgreSQL's `now()` is the time of the message. Without a source of migrations there are no messages.
    ///
    /// After an error the caller has to close the connection. The earlier migrations are recorded, so that `create_all`
    /// can continue. The result is `None` if a migration is opaque, if a text has an unterminated quote or comment, or
    /// if a migration for PostgreSQL must not run in a transaction.
    pub(crate) fn messages(&self, kind: DatabaseKind) -> Option<Vec<String>> {
        if !self.has_source {
            return Some(Vec::new());
        }
        let mut messages = vec![CREATE_MIGRATIONS_TABLE.to_owned()];
        for step in &self.steps {
            if kind == DatabaseKind::Postgres && !step.in_transaction {
                return None;
            }
            let (sql, version) = (step.sql.as_deref()?, kind.literal(&step.version));
            let separator = separator_after(sql, kind)?;
            let whole = format!("{sql}{separator}INSERT INTO __diesel_schema_migrations (version) VALUES ({version})");
            messages.push(if step.in_transaction { in_one_transaction(&whole, kind)? } else { whole });
        }
        Some(messages)
    }

    /// A hash of 128 bits as hexadecimal digits, the same in every process and build. Scripts with equal digests create
    /// equal schemas. The result is `None` if a migration is opaque.
    pub(crate) fn digest(&self) -> Option<String> {
        let mut digest = Fnv128::new();
        digest.bytes(&[u8::from(self.has_source)]);
        for step in &self.steps {
            digest.field(&step.version);
            digest.field(step.sql.as_deref()?);
            digest.bytes(&[u8::from(step.in_transaction)]);
        }
        Some(format!("{:032x}", digest.0))
    }

    /// The first migration that names an object outside its schema, on PostgreSQL, and the words that name the object.
    pub(crate) fn first_outside_reference(&self) -> Option<(String, String)> {
        self.steps.iter().find_map(|step| Some((step.name.clone(), outside_reference(step.sql.as_deref()?)?)))
    }

    pub(crate) fn versions(&self) -> impl Iterator<Item = &str> {
        self.steps.iter().map(|step| &*step.version)
    }

    /// The name of a migration. Its message has the index `index + 1` in [`messages`](Self::messages).
    pub(crate) fn name(&self, index: usize) -> Option<&str> {
        self.steps.get(index).map(|step| &*step.name)
    }

    /// The SQL texts of the migrations that are not opaque.
    pub(crate) fn texts(&self) -> impl Iterator<Item = &str> {
        self.steps.iter().filter_map(|step| step.sql.as_deref())
    }
}

/// The names of the extensions that a PostgreSQL text installs.
pub(crate) fn installed_extensions(sql: &str) -> Vec<String> {
    let tokens: Vec<Token<'_>> = Lexer::new(sql, DatabaseKind::Postgres).map(|(token, ..)| token).collect();
    let name = |token: &Token<'_>| match token {
        Token::Word(word) if !["IF", "NOT", "EXISTS"].iter().any(|other| word.eq_ignore_ascii_case(other)) => {
            Some(word.to_lowercase())
        }
        Token::QuotedName(name) => Some((*name).to_owned()),
        _ => None,
    };
    let installs = |pair: &[Token<'_>]| is_word(pair[0], "CREATE") && is_word(pair[1], "EXTENSION");
    let starts = tokens.windows(2).enumerate().filter(|(_, pair)| installs(pair)).map(|(index, _)| index + 2);
    starts.filter_map(|start| tokens[start..].iter().take(4).find_map(name)).collect()
}

/// The kinds of PostgreSQL objects that belong to no schema.
const WITHOUT_SCHEMA: [&str; 7] = ["EXTENSION", "SCHEMA", "DATABASE", "EVENT", "PUBLICATION", "SUBSCRIPTION", "SERVER"];

/// The functions whose argument is the name of a relation as a string.
const TAKES_RELATION_NAME: [&str; 5] = ["NEXTVAL", "SETVAL", "CURRVAL", "TO_REGCLASS", "TO_REGTYPE"];

/// The first words of a PostgreSQL text that name an object outside the schema in which the text runs. The function
/// ignores comments, and strings except those that are names. It reads the bodies of functions.
pub(crate) fn outside_reference(sql: &str) -> Option<String> {
    let tokens: Vec<_> = Lexer::new(sql, DatabaseKind::Postgres).collect();
    let token = |index: usize| tokens.get(index).map(|(token, ..)| *token);
    let is = |index: Option<usize>, word: &str| index.and_then(token).is_some_and(|token| is_word(token, word));
    let is_symbol = |index: usize, symbol| token(index) == Some(Token::Symbol(symbol));
    let is_public = |index| matches!(token(index), Some(Token::Word(name) | Token::QuotedName(name)) if name.eq_ignore_ascii_case("public"));
    let words = |first: usize, last: usize| {
        let last = last.min(tokens.len() - 1);
        let words: Vec<&str> = (first..=last).map(|index| &sql[tokens[index].1..tokens[index].2]).collect();
        words.join(" ").replace(" . ", ".")
    };
    for (index, &(current, ..)) in tokens.iter().enumerate() {
        let (before, this) = (index.checked_sub(1), Some(index));
        if is_public(index) && is_symbol(index + 1, '.') {
            return Some(words(index, index + 2));
        }
        match current {
            Token::DollarQuoted(body) => {
                if let Some(words) = outside_reference(body) {
                    return Some(words);
                }
            }
            Token::StringLiteral(text) => {
                let is_name = is_symbol(index + 1, ':') && is_symbol(index + 2, ':') && is_reg_type(token(index + 3))
                    || before.is_some_and(|before| is_symbol(before, '('))
                        && TAKES_RELATION_NAME.iter().any(|function| is(index.checked_sub(2), function));
                // The string `search_path` counts as an argument of `set_config`.
                if text.eq_ignore_ascii_case("search_path") || is_name && outside_reference(text).is_some() {
                    return Some(words(index, index));
                }
            }
            Token::QuotedName(name) if name.eq_ignore_ascii_case("search_path") => {
                return Some(words(index, index));
            }
            Token::Word(_) if is(this, "SEARCH_PATH") => return Some(words(index, index)),
            Token::Word(_) if is(this, "SCHEMA") && is_public(index + 1) => return Some(words(index, index + 1)),
            // `SET schema = ..` sets a column with this name.
            Token::Word(_) if is(this, "SCHEMA") && is(before, "SET") && !is_symbol(index + 1, '=') => {
                return Some(words(index - 1, index + 1));
            }
            Token::Word(_)
                if WITHOUT_SCHEMA.iter().any(|object| is(this, object))
                    && ["CREATE", "ALTER", "DROP"].iter().any(|verb| is(before, verb)) =>
            {
                return Some(words(index - 1, index));
            }
            _ => {}
        }
    }
    None
}

fn is_word(token: Token<'_>, wanted: &str) -> bool {
    matches!(token, Token::Word(word) if word.eq_ignore_ascii_case(wanted))
}

/// Whether a token is a type such as `regclass`, to which a cast turns a string into a name.
fn is_reg_type(token: Option<Token<'_>>) -> bool {
    matches!(token, Some(Token::Word(word)) if word.to_ascii_lowercase().starts_with("reg"))
}

/// One message that runs `sql` as a transaction. `None` if `sql` has an unterminated quote or comment.
pub(crate) fn in_one_transaction(sql: &str, kind: DatabaseKind) -> Option<String> {
    let begin = if kind == DatabaseKind::Sqlite { "BEGIN IMMEDIATE" } else { "BEGIN" };
    Some(format!("{begin};\n{sql}{}COMMIT", separator_after(sql, kind)?))
}

/// The separator between `sql` and another statement. MySQL refuses an empty statement, so the separator has no `;` if
/// `sql` ends with one. `None` if `sql` has an unterminated quote or comment.
fn separator_after(sql: &str, kind: DatabaseKind) -> Option<&'static str> {
    let mut lexer = Lexer::new(sql, kind);
    let last = lexer.by_ref().last();
    match last {
        _ if lexer.is_unterminated() => None,
        None | Some((Token::Symbol(';'), ..)) => Some("\n"),
        Some(_) => Some("\n;\n"),
    }
}

/// The SQL that a migration sends. `None` if the migration fails, or may do more than to send SQL.
fn recorded_sql<DB: Backend>(migration: &dyn Migration<DB>, kind: DatabaseKind) -> Option<String> {
    let mut conn = RecordingConnection::default();
    let result = catch_unwind(AssertUnwindSafe(|| migration.run(&mut conn)));
    if !matches!(result, Ok(Ok(()))) || conn.was_inspected() || conn.sent.is_empty() {
        return None;
    }
    conn.sent.retain(|sql| !kind.is_blank(sql));
    let Some((last, before)) = conn.sent.split_last() else { return Some(String::new()) };
    let mut text = String::new();
    for sql in before {
        text.push_str(sql);
        text.push_str(separator_after(sql, kind)?);
    }
    text.push_str(last);
    Some(text)
}

/// FNV-1a with 128 bits. The standard library's hashers may change from one build to the next.
struct Fnv128(u128);

impl Fnv128 {
    const fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }

    /// Hashes a field with its length, so that the boundary between two fields changes the hash.
    fn field(&mut self, text: &str) {
        self.bytes(&(text.len() as u64).to_le_bytes());
        self.bytes(text.as_bytes());
    }
}

#[cfg(test)]
#[path = "script_tests.rs"]
mod tests;
