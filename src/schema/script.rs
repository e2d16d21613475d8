//! What migrations send, as text, without a database.

use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use diesel::backend::Backend;
use diesel::connection::{BoxableConnection, SimpleConnection};
use diesel::migration::{CREATE_MIGRATIONS_TABLE, Migration};
use diesel::result::QueryResult;

use super::version;
use crate::app::App;
use crate::backend::sql_text::{after_comment, after_escaped, is_escape_string, is_word};
use crate::backend::{Kind, fnv1a};
use crate::connection::SessionConnection;
use crate::error::{Error, Result};

/// The migrations of an application, in the order of their versions.
#[derive(Debug)]
pub(crate) struct Script {
    steps: Vec<Step>,
}

#[derive(Debug)]
struct Step {
    version: String,
    name: String,
    /// None where it is code of the program's own that does more than to send text.
    sql: Option<String>,
    in_transaction: bool,
}

impl<C: SessionConnection> App<C> {
    /// What the application's migrations send. Nothing where it has none.
    pub(crate) fn script(&self) -> Result<Script> {
        let mut migrations = match self.known_migrations() {
            Err(Error::NoMigrations { .. }) => return Ok(Script { steps: Vec::new() }),
            known => known?,
        };
        migrations.sort_by_cached_key(|migration| version(&**migration));
        Ok(Script { steps: migrations.iter().map(|migration| Step::of(&**migration)).collect() })
    }
}

impl Step {
    fn of<DB: Backend>(migration: &dyn Migration<DB>) -> Self {
        let mut recorder = Recorder { sql: String::new(), looked_at: false };
        let outcome = catch_unwind(AssertUnwindSafe(|| migration.run(&mut recorder)));
        let told = matches!(outcome, Ok(Ok(()))) && !recorder.looked_at && !recorder.sql.trim().is_empty();
        Self {
            version: version(migration),
            name: migration.name().to_string(),
            sql: told.then_some(recorder.sql),
            in_transaction: migration.metadata().run_in_transaction(),
        }
    }
}

/// Stands for a connection and keeps what is sent.
struct Recorder {
    sql: String,
    /// Somebody wanted to know what connection it is.
    looked_at: bool,
}

impl SimpleConnection for Recorder {
    fn batch_execute(&mut self, sql: &str) -> QueryResult<()> {
        self.sql.push_str(sql);
        // Whatever it ends in: a statement, or a comment.
        self.sql.push_str("\n;\n");
        Ok(())
    }
}

impl<DB: Backend> BoxableConnection<DB> for Recorder {
    fn as_any(&self) -> &dyn std::any::Any {
        &()
    }

    fn as_any_mut(&mut self) -> &mut dyn std::any::Any {
        self.looked_at = true;
        self
    }
}

impl Script {
    pub(crate) fn versions(&self) -> impl Iterator<Item = &str> {
        self.steps.iter().map(|step| step.version.as_str())
    }

    /// All of it as one text for an empty database, with its bookkeeping, of which the versions come last. None where it is not
    /// known, or cannot be one text.
    pub(crate) fn batch(&self, kind: Kind) -> Option<String> {
        if self.steps.is_empty() {
            return Some(String::new());
        }
        let mut batch = format!("{CREATE_MIGRATIONS_TABLE}\n");
        for step in &self.steps {
            if !step.in_transaction && kind != Kind::Mysql {
                return None;
            }
            batch.push_str(step.sql.as_ref()?);
        }
        let versions: Vec<String> = self.versions().map(|version| format!("({})", kind.literal(version))).collect();
        let _ = writeln!(batch, "INSERT INTO __diesel_schema_migrations (version) VALUES {};", versions.join(", "));
        Some(batch)
    }

    /// Equal for scripts that make equal schemas, in every process. None where something is not known.
    pub(crate) fn digest(&self) -> Option<String> {
        let mut parts: Vec<Vec<u8>> = Vec::new();
        for step in &self.steps {
            let sql = step.sql.as_ref()?;
            parts.push(format!("{}:{}:{}:", step.version.len(), sql.len(), step.in_transaction).into_bytes());
            parts.extend([step.version.clone().into_bytes(), sql.clone().into_bytes()]);
        }
        let (hash, other) = (fnv1a(parts.iter().map(Vec::as_slice)), fnv1a(parts.iter().rev().map(Vec::as_slice)));
        Some(format!("{hash:016x}{other:016x}"))
    }

    /// The first migration that names something outside of a schema of its own, and what it says. It need not be known whole.
    pub(crate) fn leaves_its_schema(&self) -> Option<(String, String)> {
        let found = |step: &Step| Some((step.name.clone(), leaves_schema(step.sql.as_ref()?)?));
        self.steps.iter().find_map(found)
    }
}

/// The words in `sql`, for PostgreSQL, that reach outside of the schema in which it is run.
pub(crate) fn leaves_schema(sql: &str) -> Option<String> {
    let words = words(sql);
    let is = |at: usize, wanted: &str| words.get(at).is_some_and(|word: &String| word == wanted);
    (0..words.len()).find_map(|at| match words[at].as_str() {
        "public" if is(at + 1, ".") => Some("public.".to_owned()),
        "search_path" => Some("search_path".to_owned()),
        "create" | "drop" | "alter" if is(at + 1, "extension") || is(at + 1, "schema") => {
            Some(format!("{} {}", words[at], words[at + 1]))
        }
        "set" if is(at + 1, "schema") => Some("set schema".to_owned()),
        _ => None,
    })
}

/// Words and dots of `sql`, in lower case: without comments and strings, with quoted names and with the bodies of functions.
fn words(sql: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = sql;
    while let Some(c) = rest.chars().next() {
        let before = &sql[..sql.len() - rest.len()];
        let after = &rest[c.len_utf8()..];
        rest = match c {
            '\'' if is_escape_string(before) => after_escaped(after, c),
            '\'' => after.split_once('\'').map_or("", |(_, rest)| rest),
            '"' => match after.split_once('"') {
                Some((name, rest)) => {
                    words.push(name.to_owned());
                    rest
                }
                None => "",
            },
            '-' | '/' => after_comment(rest, false).unwrap_or(after),
            c if is_word(c) => {
                let end = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
                words.push(rest[..end].to_lowercase());
                &rest[end..]
            }
            '.' => {
                words.push(".".into());
                after
            }
            _ => after,
        };
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_reaches_outside_is_found() {
        for (sql, found) in [
            ("CREATE TABLE public.users (id INT)", "public."),
            ("SELECT * FROM \"public\" . users", "public."),
            ("CREATE FUNCTION f() RETURNS int AS $$ SELECT count(*) FROM Public.users $$ LANGUAGE sql", "public."),
            ("SET search_path TO x", "search_path"),
            ("create  EXTENSION IF NOT EXISTS citext", "create extension"),
            ("CREATE SCHEMA shop", "create schema"),
        ] {
            assert_eq!(leaves_schema(sql).as_deref(), Some(found), "{sql}");
        }
        for sql in [
            "CREATE TABLE users (public BOOLEAN)",
            "-- public.users\nSELECT 1",
            "/* public.x */ INSERT INTO t VALUES ('public.users', E'it\\'s public.x')",
            "CREATE TABLE republic (id INT); SELECT republic.id FROM republic",
        ] {
            assert_eq!(leaves_schema(sql), None, "{sql}");
        }
    }
}

#[cfg(all(test, feature = "sqlite"))]
mod replay {
    use diesel::SqliteConnection;
    use diesel::connection::SimpleConnection;
    use diesel::migration::{Migration, MigrationSource};
    use diesel::sqlite::Sqlite;
    use diesel_migrations::{EmbeddedMigrations, embed_migrations};

    use crate::backend::Kind;
    use crate::connection::Inspect;
    use crate::{Config, Database};

    const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations/sqlite");

    /// A migration that is code.
    struct Code;

    impl MigrationSource<Sqlite> for Code {
        fn migrations(&self) -> diesel::migration::Result<Vec<Box<dyn Migration<Sqlite>>>> {
            let mut all = MigrationSource::<Sqlite>::migrations(&MIGRATIONS)?;
            all.truncate(1);
            Ok(all)
        }
    }

    #[test]
    fn a_replayed_schema_is_the_migrated_one() {
        let migrated = Database::<SqliteConnection>::new(MIGRATIONS);
        let app = migrated.init_app("migrated", Config::new(":memory:")).expect("sound");
        app.create_all().expect("they run");
        let script = app.script().expect("they can be read");
        let other = migrated.init_app("replayed", Config::new(":memory:")).expect("sound");
        let session = other.open_session().expect("it is registered");
        let batch = script.batch(Kind::Sqlite).expect("all is text");
        session.with(|conn| conn.batch_execute(&batch)).expect("it runs");
        session.commit().expect("it commits");
        drop(session);
        let inventory = |app: &crate::App<SqliteConnection>| {
            let session = app.open_session().expect("it is registered");
            session.with(|conn| conn.texts(Kind::Sqlite.inventory())).expect("it answers")
        };
        assert_eq!(inventory(&other), inventory(&app));
        assert!(other.migrations().expect("they can be read").iter().all(|migration| migration.applied));
        assert_eq!(other.create_all().expect("nothing is pending"), Vec::<String>::new());
        assert_eq!(script.digest(), other.script().expect("the same").digest());
        let shorter = Database::<SqliteConnection, Code>::new(Code);
        let shorter = shorter.init_app("shorter", Config::new(":memory:")).expect("sound");
        assert!(shorter.script().expect("they can be read").versions().count() <= script.versions().count());
    }
}
