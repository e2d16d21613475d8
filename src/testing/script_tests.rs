//! Tests of scripts.

use super::*;

fn step(version: &str, texts: Option<&[&str]>, in_transaction: bool) -> Step {
    let texts = texts.map(|texts| texts.iter().map(|text| (*text).to_owned()).collect());
    Step { version: version.into(), name: format!("{version}_name"), texts, in_transaction }
}

#[test]
fn digest_depends_on_every_field_and_is_stable() {
    let digest = |steps| Script::new(steps, true).digest.expect("it is all text");
    let one = digest(vec![step("1", Some(&["AB"]), true)]);
    assert_eq!(one, digest(vec![step("1", Some(&["AB"]), true)]));
    assert_eq!(hash_of_fields(["foo", "bar"]), 0xe85e_3531_f507_e34a, "another hash would make all templates anew");
    for other in [
        vec![],
        vec![step("1", Some(&["A"]), true), step("B", Some(&[]), true)],
        vec![step("1", Some(&["A", "B"]), true)],
        vec![step("1A", Some(&["B"]), true)],
        vec![step("1", Some(&["AB"]), false)],
        vec![step("2", Some(&["AB"]), true)],
    ] {
        assert_ne!(one, digest(other));
    }
    assert_ne!(Script::new(Vec::new(), false).digest, Script::new(Vec::new(), true).digest);
    assert_eq!(Script::new(vec![step("1", Some(&["A"]), true), step("2", None, true)], true).digest, None);
}

#[test]
fn outside_reference_finds_words_that_leave_the_schema() {
    for (sql, words) in [
        ("CREATE TABLE public.a (b INT)", "public.a"),
        ("SELECT 1; SELECT * FROM \"Public\" . \"a\"", "\"Public\".\"a\""),
        ("SELECT PUBLIC/* x */. a", "PUBLIC.a"),
        ("create  extension if not exists citext", "create extension"),
        ("CREATE SCHEMA a", "CREATE SCHEMA"),
        ("DROP -- x\n SCHEMA a", "DROP SCHEMA"),
        ("SET search_path = a", "search_path"),
        ("SELECT pg_catalog.set_config('search_path', '', false)", "'search_path'"),
        ("GRANT USAGE ON SCHEMA public TO a", "SCHEMA public"),
        ("ALTER TABLE a SET SCHEMA b", "SET SCHEMA b"),
        ("CREATE FUNCTION f() RETURNS int AS $b$ SELECT 'x' FROM public.a $b$ LANGUAGE sql", "public.a"),
        ("DO $$ BEGIN CREATE EXTENSION citext; END $$", "CREATE EXTENSION"),
        ("CREATE TABLE a (b INT DEFAULT nextval('public.c'::regclass))", "'public.c'"),
        ("SELECT setval('public.c', 1)", "'public.c'"),
    ] {
        assert_eq!(outside_reference(sql).as_deref(), Some(words), "{sql}");
    }
    let steps = vec![
        step("1", Some(&["SELECT 1"]), true),
        step("2", None, true),
        step("3", Some(&["SELECT 1", "SELECT public.a()"]), true),
    ];
    assert_eq!(Script::new(steps, true).first_outside_reference(), Some(("3_name", "public.a".into())));
}

#[test]
fn outside_reference_ignores_words_that_stay_in_the_schema() {
    for sql in [
        "",
        "CREATE TABLE a (public BOOLEAN, schema TEXT, \"publication\" INT)",
        "SELECT a.public FROM a; UPDATE a SET schema = 'x', public = true",
        "INSERT INTO a VALUES ('public.b', 'CREATE SCHEMA', E'\\'public.b')",
        "-- public.a\n/* CREATE EXTENSION /* x */ public.b */ SELECT 1",
        "CREATE FUNCTION f() RETURNS int AS $b$ -- public.a\n SELECT 1 $b$ LANGUAGE sql",
        "SELECT nextval('a'::regclass), republic.a FROM republic",
        "CREATE TABLE schema (a INT); CREATE TABLE events (a INT)",
    ] {
        assert_eq!(outside_reference(sql), None, "{sql}");
    }
}

#[cfg(feature = "sqlite")]
mod sqlite {
    use diesel::SqliteConnection;
    use diesel::connection::BoxableConnection;
    use diesel::migration::{self, MigrationMetadata, MigrationName, MigrationSource, MigrationVersion};
    use diesel::sqlite::Sqlite;

    use super::*;
    use crate::{Config, Database};

    #[derive(Clone, Copy)]
    enum Action {
        Send(&'static [&'static str]),
        Inspect,
        Fail,
        Panic,
    }

    #[derive(Clone, Copy)]
    struct TestMigration(&'static str, Action, bool);

    impl std::fmt::Display for TestMigration {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(self.0)
        }
    }

    impl MigrationName for TestMigration {
        fn version(&self) -> MigrationVersion<'_> {
            self.0.into()
        }
    }

    impl MigrationMetadata for TestMigration {
        fn run_in_transaction(&self) -> bool {
            self.2
        }
    }

    impl Migration<Sqlite> for TestMigration {
        fn run(&self, conn: &mut dyn BoxableConnection<Sqlite>) -> migration::Result<()> {
            match self.1 {
                Action::Send(texts) => texts.iter().try_for_each(|sql| conn.batch_execute(sql))?,
                Action::Inspect => {
                    conn.batch_execute("SELECT 1")?;
                    let _ = conn.as_any_mut().downcast_mut::<SqliteConnection>();
                }
                Action::Fail => return Err("no".into()),
                Action::Panic => panic!("no"),
            }
            Ok(())
        }

        fn revert(&self, _: &mut dyn BoxableConnection<Sqlite>) -> migration::Result<()> {
            Ok(())
        }

        fn metadata(&self) -> &dyn MigrationMetadata {
            self
        }

        fn name(&self) -> &dyn MigrationName {
            self
        }
    }

    struct Source(Vec<TestMigration>);

    impl MigrationSource<Sqlite> for Source {
        fn migrations(&self) -> migration::Result<Vec<Box<dyn Migration<Sqlite>>>> {
            Ok(self.0.iter().map(|migration| Box::new(*migration) as Box<dyn Migration<Sqlite>>).collect())
        }
    }

    fn app(migrations: Vec<TestMigration>) -> App<SqliteConnection> {
        let db = Database::new(Source(migrations));
        db.init_app("app", Config::new(":memory:").max_size(1)).expect("sound")
    }

    #[test]
    fn script_treats_code_of_the_program_as_opaque() {
        let texts = |action| {
            let app = app(vec![TestMigration("1", action, true)]);
            Script::of(&app).expect("it can be read").steps.remove(0).texts
        };
        for action in [Action::Inspect, Action::Fail, Action::Panic, Action::Send(&[])] {
            assert_eq!(texts(action), None);
        }
        assert_eq!(texts(Action::Send(&[" ", "-- x"])), Some(vec![]), "there is nothing to send");
        let sent = texts(Action::Send(&["SELECT 1 -- x", " ", "SELECT 2;"]));
        assert_eq!(sent, Some(vec!["SELECT 1 -- x".to_owned(), "SELECT 2;".to_owned()]));
        let none = Database::<SqliteConnection>::without_migrations();
        let none = none.init_app("app", Config::new(":memory:")).expect("sound");
        assert!(!Script::of(&none).expect("an empty one").has_source);
    }
}
