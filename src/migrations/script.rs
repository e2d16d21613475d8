//! What an application's migrations send, as text, known without a database.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use diesel::backend::Backend;
use diesel::connection::{BoxableConnection, SimpleConnection};
use diesel::migration::{CREATE_MIGRATIONS_TABLE, Migration};
use diesel::result::QueryResult;

use crate::app::App;
use crate::connection::SessionConnection;
use crate::dialect::sql_parts::{Part, Parts};
use crate::error::{Error, Result};
use crate::kind::DatabaseKind;

/// The migrations of an application for the kind of database it has, in the order of their versions.
#[derive(Debug)]
pub(crate) struct Script {
    steps: Vec<Step>,
    /// Whether there are migrations for this kind, be they none; otherwise `create_all` makes nothing, not even its own table.
    known: bool,
}

/// One migration.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) version: String,
    pub(crate) name: String,
    /// `None` where it is opaque: code of the program's own whose effect no text describes.
    pub(crate) sql: Option<String>,
    pub(crate) in_transaction: bool,
}

impl<C: SessionConnection> App<C> {
    /// What its migrations send. The database is not asked.
    pub(crate) fn script(&self) -> Result<Script> {
        let known = match self.known_migrations() {
            Err(Error::NoMigrations { .. }) => return Ok(Script { steps: Vec::new(), known: false }),
            known => known?,
        };
        let kind = self.options().target.kind;
        let steps = known.into_iter().map(|known| Step {
            sql: text_of(&*known.migration, kind),
            version: known.version,
            name: known.name,
            in_transaction: known.in_transaction,
        });
        Ok(Script { steps: steps.collect(), known: true })
    }
}

impl Script {
    /// Texts that make on an empty database what `create_all` makes. Each is sent as a message of its own, outside of any
    /// transaction, as what a migration sets for its transaction must not reach the next one, and PostgreSQL's `now()` is that of the
    /// message. There are none if there are no migrations for this kind.
    ///
    /// After an error the connection is to be closed. What was done before it is recorded, so that `create_all` can continue.
    /// `None` if something is opaque or has no end, or if a migration for PostgreSQL is not to run in a transaction.
    pub(crate) fn messages(&self, kind: DatabaseKind) -> Option<Vec<String>> {
        if !self.known {
            return Some(Vec::new());
        }
        let mut messages = vec![CREATE_MIGRATIONS_TABLE.to_owned()];
        for step in &self.steps {
            if kind == DatabaseKind::Postgres && !step.in_transaction {
                return None;
            }
            let (sql, version) = (step.sql.as_deref()?, kind.literal(&step.version));
            let ending = ending(sql, kind)?;
            let whole = format!("{sql}{ending}INSERT INTO __diesel_schema_migrations (version) VALUES ({version})");
            messages.push(if step.in_transaction { transaction(&whole, kind)? } else { whole });
        }
        Some(messages)
    }

    /// Two scripts with the same digest make the same schema: 128 bits as hexadecimal digits, the same in every process and build.
    /// `None` where something is opaque.
    pub(crate) fn digest(&self) -> Option<String> {
        let mut digest = Fnv::new();
        digest.bytes(&[u8::from(self.known)]);
        for step in &self.steps {
            digest.field(&step.version);
            digest.field(step.sql.as_deref()?);
            digest.bytes(&[u8::from(step.in_transaction)]);
        }
        Some(format!("{:032x}", digest.0))
    }

    /// The first migration that names something outside of the schema it is applied in, on PostgreSQL, and the words.
    pub(crate) fn leaves_its_schema(&self) -> Option<(String, String)> {
        self.steps.iter().find_map(|step| Some((step.name.clone(), leaves_schema(step.sql.as_deref()?)?)))
    }

    pub(crate) fn versions(&self) -> impl Iterator<Item = &str> {
        self.steps.iter().map(|step| &*step.version)
    }

    /// The names of the migrations, in the order of [`messages`](Self::messages) after the first.
    pub(crate) fn name(&self, index: usize) -> Option<&str> {
        self.steps.get(index).map(|step| &*step.name)
    }

    /// Their texts, as far as they are known.
    pub(crate) fn texts(&self) -> impl Iterator<Item = &str> {
        self.steps.iter().filter_map(|step| step.sql.as_deref())
    }
}

/// The names of the extensions that a PostgreSQL text installs.
pub(crate) fn extensions(sql: &str) -> Vec<String> {
    let parts: Vec<Part<'_>> = Parts::of(sql, DatabaseKind::Postgres).map(|(part, ..)| part).collect();
    let name = |part: &Part<'_>| match part {
        Part::Word(word) if !["IF", "NOT", "EXISTS"].iter().any(|other| word.eq_ignore_ascii_case(other)) => {
            Some(word.to_lowercase())
        }
        Part::Name(name) => Some((*name).to_owned()),
        _ => None,
    };
    let installs = |pair: &[Part<'_>]| is_word(pair[0], "CREATE") && is_word(pair[1], "EXTENSION");
    let places = parts.windows(2).enumerate().filter(|(_, pair)| installs(pair)).map(|(at, _)| at + 2);
    places.filter_map(|at| parts[at..].iter().take(4).find_map(name)).collect()
}

/// What belongs to the whole of a PostgreSQL database, or to none of its schemas.
const OUTSIDE: [&str; 7] = ["EXTENSION", "SCHEMA", "DATABASE", "EVENT", "PUBLICATION", "SUBSCRIPTION", "SERVER"];

/// Functions whose argument is the name of a relation as a string.
const NAMING: [&str; 5] = ["NEXTVAL", "SETVAL", "CURRVAL", "TO_REGCLASS", "TO_REGTYPE"];

/// The first words in a PostgreSQL text that name something outside of the schema in which the text is run. Comments and strings
/// do not count, but for the strings that are names; bodies of functions do.
pub(crate) fn leaves_schema(sql: &str) -> Option<String> {
    let parts: Vec<_> = Parts::of(sql, DatabaseKind::Postgres).collect();
    let part = |at: usize| parts.get(at).map(|(part, ..)| *part);
    let is = |at: Option<usize>, word: &str| at.and_then(part).is_some_and(|part| is_word(part, word));
    let is_sign = |at: usize, sign| part(at) == Some(Part::Sign(sign));
    let is_public =
        |at| matches!(part(at), Some(Part::Word(name) | Part::Name(name)) if name.eq_ignore_ascii_case("public"));
    let words = |first: usize, last: usize| {
        let last = last.min(parts.len() - 1);
        let words: Vec<&str> = (first..=last).map(|at| &sql[parts[at].1..parts[at].2]).collect();
        words.join(" ").replace(" . ", ".")
    };
    for (at, &(here, ..)) in parts.iter().enumerate() {
        let (before, this) = (at.checked_sub(1), Some(at));
        if is_public(at) && is_sign(at + 1, '.') {
            return Some(words(at, at + 2));
        }
        match here {
            Part::Body(body) => {
                if let Some(words) = leaves_schema(body) {
                    return Some(words);
                }
            }
            Part::Text(text) => {
                let is_name = is_sign(at + 1, ':') && is_sign(at + 2, ':') && is_reg(part(at + 3))
                    || before.is_some_and(|before| is_sign(before, '('))
                        && NAMING.iter().any(|function| is(at.checked_sub(2), function));
                // An argument of `set_config`; nobody's data.
                if text.eq_ignore_ascii_case("search_path") || is_name && leaves_schema(text).is_some() {
                    return Some(words(at, at));
                }
            }
            Part::Name(name) if name.eq_ignore_ascii_case("search_path") => return Some(words(at, at)),
            Part::Word(_) if is(this, "SEARCH_PATH") => return Some(words(at, at)),
            Part::Word(_) if is(this, "SCHEMA") && is_public(at + 1) => return Some(words(at, at + 1)),
            // Not a column of that name.
            Part::Word(_) if is(this, "SCHEMA") && is(before, "SET") && !is_sign(at + 1, '=') => {
                return Some(words(at - 1, at + 1));
            }
            Part::Word(_)
                if OUTSIDE.iter().any(|outside| is(this, outside))
                    && ["CREATE", "ALTER", "DROP"].iter().any(|verb| is(before, verb)) =>
            {
                return Some(words(at - 1, at));
            }
            _ => {}
        }
    }
    None
}

fn is_word(part: Part<'_>, wanted: &str) -> bool {
    matches!(part, Part::Word(word) if word.eq_ignore_ascii_case(wanted))
}

/// Whether a cast makes a name of a string.
fn is_reg(part: Option<Part<'_>>) -> bool {
    matches!(part, Some(Part::Word(word)) if word.to_ascii_lowercase().starts_with("reg"))
}

/// A text as one transaction. `None` if all that follows it would be in a quote or a comment.
pub(crate) fn transaction(sql: &str, kind: DatabaseKind) -> Option<String> {
    let begin = if kind == DatabaseKind::Sqlite { "BEGIN IMMEDIATE" } else { "BEGIN" };
    Some(format!("{begin};\n{sql}{}COMMIT", ending(sql, kind)?))
}

/// What has to stand between `sql` and another statement: MySQL does not like one `;` too many. `None` where all that follows
/// would be in a quote or a comment.
fn ending(sql: &str, kind: DatabaseKind) -> Option<&'static str> {
    let mut parts = Parts::of(sql, kind);
    let last = parts.by_ref().last();
    match last {
        _ if parts.is_open() => None,
        None | Some((Part::Sign(';'), ..)) => Some("\n"),
        Some(_) => Some("\n;\n"),
    }
}

/// The text that a migration sends, where that is all it does.
fn text_of<DB: Backend>(migration: &dyn Migration<DB>, kind: DatabaseKind) -> Option<String> {
    let mut recorder = Recorder::default();
    let ran = catch_unwind(AssertUnwindSafe(|| migration.run(&mut recorder)));
    if !matches!(ran, Ok(Ok(()))) || recorder.looked_into.get() {
        return None;
    }
    // Of a text without a statement nothing is sent.
    if recorder.sent.is_empty() {
        return None;
    }
    recorder.sent.retain(|sql| !kind.is_blank(sql));
    let Some((last, before)) = recorder.sent.split_last() else { return Some(String::new()) };
    let mut text = String::new();
    for sql in before {
        text.push_str(sql);
        text.push_str(ending(sql, kind)?);
    }
    text.push_str(last);
    Some(text)
}

/// Stands for a connection and keeps what is sent.
#[derive(Default)]
struct Recorder {
    sent: Vec<String>,
    /// Somebody wants to know which connection it is, and will do with it what no text tells.
    looked_into: Cell<bool>,
}

impl SimpleConnection for Recorder {
    fn batch_execute(&mut self, sql: &str) -> QueryResult<()> {
        self.sent.push(sql.to_owned());
        Ok(())
    }
}

impl<DB: Backend> BoxableConnection<DB> for Recorder {
    fn as_any(&self) -> &dyn Any {
        self.looked_into.set(true);
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self.looked_into.set(true);
        self
    }
}

/// FNV-1a of 128 bits: the standard library's hashers promise nothing from one build to the next.
struct Fnv(u128);

impl Fnv {
    const fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }

    /// With its length, so that what one field ends with is never what the next begins with.
    fn field(&mut self, text: &str) {
        self.bytes(&(text.len() as u64).to_le_bytes());
        self.bytes(text.as_bytes());
    }
}

#[cfg(test)]
#[path = "script_tests.rs"]
mod tests;
