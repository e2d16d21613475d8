//! The SQL of an application's migrations, which the library determines without a database.

use std::panic::{AssertUnwindSafe, catch_unwind};

use diesel::backend::Backend;
use diesel::migration::Migration;

use crate::app::App;
use crate::connection::SessionConnection;
use crate::dialect::fnv1a;
use crate::dialect::lexer::{Lexer, Token};
use crate::error::{ErrorKind, Result};
use crate::kind::DatabaseKind;
use crate::migrations::RecordingConnection;

/// The migrations of an application for its kind of database, in the order of their versions.
#[derive(Debug)]
pub(super) struct Script {
    pub(super) steps: Vec<Step>,
    /// Whether there is a source of migrations for this kind. Without a source `create_all` is an error.
    pub(super) has_source: bool,
    /// A hash that is the same in every process and build. Scripts with equal digests create equal schemas. `None` if a
    /// migration is opaque.
    pub(super) digest: Option<u64>,
}

/// One migration.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) version: String,
    pub(super) name: String,
    /// The texts that the migration sends. `None` if the migration is opaque: it is code of the program, whose effect
    /// no SQL text describes.
    pub(super) texts: Option<Vec<String>>,
    pub(super) in_transaction: bool,
}

impl Script {
    /// The SQL of the application's migrations. The function does not use the database.
    pub(super) fn of<C: SessionConnection>(app: &App<C>) -> Result<Self> {
        let (known, has_source) = match app.known_migrations() {
            Err(error) if error.kind() == ErrorKind::NoMigrations => (Vec::new(), false),
            known => (known?, true),
        };
        let kind = app.options().target.kind;
        let steps = known.into_iter().map(|known| Step {
            texts: recorded_texts(&*known.migration, kind),
            version: known.version,
            name: known.name,
            in_transaction: known.in_transaction,
        });
        Ok(Self::new(steps.collect(), has_source))
    }

    fn new(steps: Vec<Step>, has_source: bool) -> Self {
        let mut fields = vec![has_source.to_string()];
        for Step { version, texts, in_transaction, .. } in &steps {
            let texts = texts.as_deref().unwrap_or_default();
            fields.extend([version.clone(), format!("{in_transaction} {}", texts.len())]);
            fields.extend_from_slice(texts);
        }
        let digest = steps.iter().all(|step| step.texts.is_some()).then(|| hash_of_fields(fields));
        Self { steps, has_source, digest }
    }

    /// The first migration that names an object outside its schema, on PostgreSQL, and the words that name the object.
    pub(super) fn first_outside_reference(&self) -> Option<(&str, String)> {
        let texts = self.steps.iter().flat_map(|step| step.texts.iter().flatten().map(|text| (&*step.name, text)));
        texts.into_iter().find_map(|(name, text)| Some((name, outside_reference(text)?)))
    }
}

/// A hash in which the boundary between two fields matters. The standard library's hashers may change from one build to
/// the next.
pub(super) fn hash_of_fields(fields: impl IntoIterator<Item = impl AsRef<[u8]>>) -> u64 {
    let mut bytes = Vec::new();
    for field in fields {
        bytes.extend(field.as_ref().len().to_le_bytes());
        bytes.extend(field.as_ref());
    }
    fnv1a([&bytes[..]])
}

/// The words of a PostgreSQL text that name an object outside the schema, with alternatives for each word, and the
/// number of tokens that an error shows.
const OUTSIDE: [(&[&[&str]], usize); 5] = [
    (&[&["PUBLIC"], &["."]], 3),
    (&[&["SEARCH_PATH"]], 1),
    (&[&["SCHEMA"], &["PUBLIC"]], 2),
    (&[&["SET"], &["SCHEMA"]], 3),
    (
        &[
            &["CREATE", "ALTER", "DROP"],
            &["EXTENSION", "SCHEMA", "DATABASE", "EVENT", "PUBLICATION", "SUBSCRIPTION", "SERVER"],
        ],
        2,
    ),
];

/// The functions whose argument is the name of a relation as a string.
const TAKES_RELATION_NAME: [&str; 5] = ["NEXTVAL", "SETVAL", "CURRVAL", "TO_REGCLASS", "TO_REGTYPE"];

/// The first words of a PostgreSQL text that name an object outside the schema in which the text runs. The function
/// ignores comments, and strings except those that are names. It reads the bodies of functions.
pub(super) fn outside_reference(sql: &str) -> Option<String> {
    let tokens: Vec<_> = Lexer::new(sql, DatabaseKind::Postgres).collect();
    let words = tokens.iter().map(|(token, ..)| match token {
        Token::Word(word) => word.to_ascii_uppercase(),
        Token::QuotedName(name) if name.eq_ignore_ascii_case("public") => "PUBLIC".into(),
        // The string is an argument of `set_config`.
        Token::QuotedName(name) | Token::StringLiteral(name) if name.eq_ignore_ascii_case("search_path") => {
            "SEARCH_PATH".into()
        }
        Token::Symbol(symbol) => symbol.to_string(),
        _ => String::new(),
    });
    let words: Vec<String> = words.collect();
    let word = |index: usize| words.get(index).map_or("", String::as_str);
    let shown = |first: usize, count: usize| {
        let shown: Vec<&str> =
            tokens.iter().skip(first).take(count).map(|(_, start, end)| &sql[*start..*end]).collect();
        shown.join(" ").replace(" . ", ".")
    };
    (0..tokens.len()).find_map(|index| {
        let is_cast_to_name = word(index + 1) == ":" && word(index + 2) == ":" && word(index + 3).starts_with("REG");
        let is_argument = index >= 2 && word(index - 1) == "(" && TAKES_RELATION_NAME.contains(&word(index - 2));
        match tokens[index].0 {
            Token::DollarQuoted(body) => return outside_reference(body),
            Token::StringLiteral(name) if is_cast_to_name || is_argument => {
                return outside_reference(name).map(|_| shown(index, 1));
            }
            _ => {}
        }
        let matches = |pattern: &[&[&str]]| (index..).zip(pattern).all(|(at, words)| words.contains(&word(at)));
        let (_, count) = OUTSIDE.iter().find(|(pattern, _)| matches(pattern))?;
        // `SET schema = ..` sets a column with this name.
        let is_assignment = word(index) == "SET" && word(index + 2) == "=";
        (!is_assignment).then(|| shown(index, *count))
    })
}

/// The SQL texts that a migration sends. `None` if the migration fails, or may do more than to send SQL.
fn recorded_texts<DB: Backend>(migration: &dyn Migration<DB>, kind: DatabaseKind) -> Option<Vec<String>> {
    let mut conn = RecordingConnection::default();
    let result = catch_unwind(AssertUnwindSafe(|| migration.run(&mut conn)));
    if !matches!(result, Ok(Ok(()))) || conn.inspected.get() || conn.sent.is_empty() {
        return None;
    }
    conn.sent.retain(|sql| !kind.is_blank(sql));
    Some(conn.sent)
}

#[cfg(test)]
#[path = "script_tests.rs"]
mod tests;
