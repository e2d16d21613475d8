//! Tests of scripts.

use super::*;

fn step(version: &str, sql: Option<&str>, in_transaction: bool) -> Step {
    Step { version: version.into(), name: format!("{version}_name"), sql: sql.map(Into::into), in_transaction }
}

fn script(steps: Vec<Step>) -> Script {
    Script { steps, has_source: true }
}

#[test]
fn messages_wrap_each_migration_in_a_transaction() {
    let script = script(vec![
        step("1", Some("CREATE TABLE a (b INT) -- no semicolon"), true),
        step("2", Some("CREATE TABLE c (d INT); -- 'x"), true),
        step("3'", Some("-- nothing"), true),
    ]);
    for (kind, begin) in
        [(DatabaseKind::Postgres, "BEGIN"), (DatabaseKind::Mysql, "BEGIN"), (DatabaseKind::Sqlite, "BEGIN IMMEDIATE")]
    {
        let messages = script.messages(kind).expect("it is all text");
        let insert = "INSERT INTO __diesel_schema_migrations (version) VALUES";
        assert_eq!(
            messages,
            [
                CREATE_MIGRATIONS_TABLE.to_owned(),
                format!("{begin};\nCREATE TABLE a (b INT) -- no semicolon\n;\n{insert} ('1')\n;\nCOMMIT"),
                format!("{begin};\nCREATE TABLE c (d INT); -- 'x\n{insert} ('2')\n;\nCOMMIT"),
                format!("{begin};\n-- nothing\n{insert} ('3''')\n;\nCOMMIT"),
            ]
        );
    }
}

#[test]
fn messages_have_no_transaction_for_a_migration_that_must_not_run_in_one() {
    let script = script(vec![step("1", Some("A"), true), step("2", Some("B"), false)]);
    for kind in [DatabaseKind::Sqlite, DatabaseKind::Mysql] {
        let messages = script.messages(kind).expect("it is all text");
        assert!(messages[1].contains("BEGIN") && messages[1].contains("\nA\n"), "{}", messages[1]);
        assert!(!messages[2].contains("BEGIN") && messages[2].starts_with("B\n"), "{}", messages[2]);
    }
    assert_eq!(script.messages(DatabaseKind::Postgres), None, "one message is one transaction");
}

#[test]
fn script_without_text_has_no_messages_and_no_digest() {
    let opaque = script(vec![step("1", Some("A"), true), step("2", None, true)]);
    assert_eq!((opaque.messages(DatabaseKind::Sqlite), opaque.digest()), (None, None));
    assert_eq!(opaque.versions().collect::<Vec<_>>(), ["1", "2"]);
    let open = script(vec![step("1", Some("SELECT 1 /* no end"), true)]);
    assert_eq!(open.messages(DatabaseKind::Sqlite), None);
    let none = Script { steps: Vec::new(), has_source: false };
    assert_eq!(none.messages(DatabaseKind::Mysql), Some(Vec::new()));
    assert_ne!(none.digest(), script(Vec::new()).digest());
}

#[test]
fn digest_depends_on_every_field_and_is_stable() {
    let mut fnv = Fnv128::new();
    fnv.bytes(b"foobar");
    assert_eq!(fnv.0, 0x343e_1662_793c_64bf_6f0d_3597_ba44_6f18, "the published value");
    let digest = |steps| script(steps).digest().expect("it is all text");
    let one = digest(vec![step("1", Some("AB"), true)]);
    assert_eq!(one.len(), 32);
    assert_eq!(one, digest(vec![step("1", Some("AB"), true)]));
    for other in [
        vec![],
        vec![step("1", Some("A"), true), step("B", Some(""), true)],
        vec![step("1A", Some("B"), true)],
        vec![step("1", Some("AB"), false)],
        vec![step("2", Some("AB"), true)],
    ] {
        assert_ne!(one, digest(other));
    }
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
    let script = script(vec![
        step("1", Some("SELECT 1"), true),
        step("2", None, true),
        step("3", Some("SELECT public.a()"), true),
    ]);
    assert_eq!(script.first_outside_reference(), Some(("3_name".into(), "public.a".into())));
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
    use diesel::connection::{BoxableConnection, SimpleConnection};
    use diesel::migration::{self, MigrationMetadata, MigrationName, MigrationSource, MigrationVersion};
    use diesel::sqlite::Sqlite;

    use super::*;
    use crate::connection::Inspect;
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
        for act in [Action::Inspect, Action::Fail, Action::Panic, Action::Send(&[])] {
            let script = app(vec![TestMigration("1", act, true)]).script().expect("it can be read");
            assert!(script.steps[0].sql.is_none());
        }
        let script =
            app(vec![TestMigration("1", Action::Send(&[" ", "-- x"]), true)]).script().expect("it can be read");
        assert_eq!(script.steps[0].sql.as_deref(), Some(""), "there is nothing to send");
        let script = app(vec![TestMigration("1", Action::Send(&["SELECT 1 -- x", "SELECT 2;"]), true)])
            .script()
            .expect("it can be read");
        assert_eq!(script.steps[0].sql.as_deref(), Some("SELECT 1 -- x\n;\nSELECT 2;"));
        let none = Database::<SqliteConnection>::without_migrations();
        let none = none.init_app("app", Config::new(":memory:")).expect("sound");
        assert_eq!(none.script().expect("an empty one").messages(DatabaseKind::Sqlite), Some(Vec::new()));
    }

    #[test]
    fn messages_create_the_same_schema_as_create_all() {
        let migrations = || {
            vec![
                TestMigration(
                    "2",
                    Action::Send(&["CREATE INDEX i ON a (b); INSERT INTO a VALUES (1, ';') -- x"]),
                    true,
                ),
                TestMigration("3", Action::Send(&["PRAGMA foreign_keys = OFF;", "CREATE TABLE [c;] (d INT)"]), false),
                TestMigration("1", Action::Send(&["CREATE TABLE a (b INTEGER PRIMARY KEY, c TEXT)"]), true),
                TestMigration(
                    "4",
                    Action::Send(&["CREATE TRIGGER t AFTER INSERT ON a BEGIN DELETE FROM [c;]; END"]),
                    true,
                ),
            ]
        };
        let (created, replayed) = (app(migrations()), app(migrations()));
        created.create_all().expect("they are sound");
        let messages =
            replayed.script().expect("it can be read").messages(DatabaseKind::Sqlite).expect("it is all text");
        let pool = replayed.pool().expect("a pool");
        let at = std::panic::Location::caller();
        let mut pooled = pool.acquire(at, false, None).expect("a connection");
        messages.iter().for_each(|message| pooled.conn().batch_execute(message).expect("it is sound"));
        drop(pooled);
        let of = |app: &App<SqliteConnection>, sql: &str| {
            let mut pooled = app.pool().expect("a pool").acquire(at, false, None).expect("a connection");
            pooled.conn().texts(sql).expect("it answers")
        };
        for sql in [
            DatabaseKind::Sqlite.inventory(),
            "SELECT sql AS value FROM sqlite_master ORDER BY name",
            "SELECT version AS value FROM __diesel_schema_migrations ORDER BY 1",
            "SELECT c AS value FROM a",
        ] {
            assert_eq!(of(&created, sql), of(&replayed, sql), "{sql}");
            assert!(!of(&created, sql).is_empty(), "{sql}");
        }
        assert_eq!(created.migrations().expect("it answers"), replayed.migrations().expect("it answers"));
        assert!(replayed.migrations().expect("it answers").iter().all(|one| one.applied));
        assert_eq!(replayed.create_all().expect("nothing to do"), Vec::<String>::new());
    }
}
