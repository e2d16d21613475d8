//! Several tenants in schemas of one database.

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::sql_types::Text;
use diesel_session::pool::Reset;
use diesel_session::testing::{TestApp, TestIsolation, TestSetup};
use diesel_session::{App, Config, Database, Error, ErrorKind, Result, Session};

use crate::fixtures::{SessionExt, TestConnection, TestDatabase, connect_any};
use crate::for_each_database;
use crate::support;

for_each_database!(every_database =>
    search_path_is_an_error_where_there_is_none,
    schema_operations_are_refused_in_a_scope_with_search_path,
);
for_each_database!(only postgres =>
    each_scope_reads_and_writes_its_own_tenant,
    search_path_goes_with_every_other_choice_of_a_scope,
    each_tenant_is_migrated_by_an_application_of_its_own,
    test_that_is_rolled_back_has_the_search_path_of_each_scope,
);

diesel::table! { notes (id) { id -> Integer, text -> Text, } }

#[derive(QueryableByName)]
struct Value {
    #[diesel(sql_type = Text)]
    value: String,
}

fn add(session: &Session<PgConnection>, id: i32, text: &str) -> Result<()> {
    session.execute(diesel::insert_into(notes::table).values((notes::id.eq(id), notes::text.eq(text)))).map(drop)
}

fn texts(session: &Session<PgConnection>) -> Result<Vec<String>> {
    session.load(notes::table.order(notes::id).select(notes::text))
}

const TENANTS: [&str; 3] = ["one", "Two, \"quoted\"", "it's; drop"];

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn make(conn: &mut impl SimpleConnection) -> QueryResult<()> {
    for tenant in TENANTS {
        let tenant = quoted(tenant);
        conn.batch_execute(&format!(
            "CREATE SCHEMA {tenant}; CREATE TABLE {tenant}.notes (id INTEGER PRIMARY KEY, text TEXT)"
        ))?;
    }
    Ok(())
}

fn each_scope_reads_and_writes_its_own_tenant() {
    let test_db = TestDatabase::postgres();
    make(&mut connect_any(&test_db.url()).unwrap()).unwrap();
    let app = PgConnection::app(test_db.config().max_size(1).reset(Reset::Never));
    let db = PgConnection::db();
    for tenant in TENANTS {
        app.scope()
            .search_path([tenant, "public"])
            .run(|| {
                let session = db.session()?;
                assert_eq!(texts(&session)?, [""; 0]);
                add(&session, 1, &format!("{tenant} 1"))?;
                session.commit()?;
                // Each new transaction, after a rollback and in a savepoint that is rolled back.
                add(&session, 9, "undone")?;
                session.rollback()?;
                let undone = session.savepoint(|session| {
                    add(session, 2, "undone")?;
                    session.send("SET LOCAL search_path = public")?;
                    Err::<(), _>(Error::from(diesel::result::Error::RollbackTransaction))
                });
                assert!(undone.is_err());
                add(&session, 2, &format!("{tenant} 2"))?;
                session.commit()?;
                session.retry(2, |session| add(session, 3, &format!("{tenant} 3")))
            })
            .unwrap();
        // The connection goes back without it.
        let shown = app
            .context(|| {
                db.session()?.get_result::<Value>(diesel::sql_query("SELECT current_setting('search_path') AS value"))
            })
            .unwrap();
        assert_eq!(shown.value, "\"$user\", public");
        assert!(app.context(|| texts(&db.session()?)).is_err());
    }
    let mut plain = PgConnection::establish(&test_db.url()).unwrap();
    for tenant in TENANTS {
        let sql = format!("SELECT text AS value FROM {}.notes ORDER BY id", quoted(tenant));
        let rows: Vec<Value> = diesel::sql_query(sql).load(&mut plain).unwrap();
        let rows: Vec<_> = rows.into_iter().map(|row| row.value).collect();
        assert_eq!(rows, [1, 2, 3].map(|number| format!("{tenant} {number}")));
    }
}

fn search_path_goes_with_every_other_choice_of_a_scope() {
    let test_db = TestDatabase::postgres();
    make(&mut connect_any(&test_db.url()).unwrap()).unwrap();
    let app = PgConnection::app(test_db.config());
    let db = PgConnection::db();
    let limit = std::time::Duration::from_secs(60);
    let isolation = diesel_session::session::Isolation::Serializable;
    app.scope()
        .search_path(["one"])
        .isolation(isolation)
        .deadline(limit)
        .resolvable()
        .run_and_commit(|| add(&db.session()?, 1, "one"))
        .unwrap();
    let read = app.scope().search_path(["one"]).read_only().run(|| texts(&db.session()?)).unwrap();
    assert_eq!(read, ["one"]);
    // In an autocommit scope each transaction has it, and a statement outside of one is refused.
    let outside = app.scope().search_path(["one"]).autocommit().run(|| {
        let session = db.session()?;
        session.transaction(|session| add(session, 2, "two"))?;
        let refused = add(&session, 3, "three").unwrap_err();
        assert!(refused.to_string().contains("Session::transaction"), "{refused}");
        texts(&session)
    });
    assert!(
        matches!(&outside, Err(error) if error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("autocommit")),
        "{outside:?}"
    );
    assert_eq!(app.status().in_use, 0);
    let read = app.scope().search_path(["one"]).run(|| texts(&db.session()?)).unwrap();
    assert_eq!(read, ["one", "two"]);
    // Without any schema no table is found.
    assert!(app.scope().search_path([""; 0]).run(|| texts(&db.session()?)).is_err());
}

fn search_path_is_an_error_where_there_is_none<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    let run = |app: &App<C>| app.scope().search_path(["public"]).run(|| C::db().session()?.send("SELECT 1"));
    match test_db {
        TestDatabase::Postgres(_) => run(&app).unwrap(),
        TestDatabase::Mariadb(_) | TestDatabase::Sqlite(_) => {
            let refused = run(&app).unwrap_err();
            assert!(
                refused.kind() == ErrorKind::InvalidConfig && refused.to_string().contains("PostgreSQL"),
                "{refused}"
            );
            app.context(|| C::db().session()?.send("SELECT 1")).unwrap();
        }
    }
    assert_eq!(app.status().in_use, 0);
}

fn schema_operations_are_refused_in_a_scope_with_search_path<C: TestConnection>(test_db: &TestDatabase) {
    let (app, db) = (C::app(test_db.config()), C::db());
    let tenant = || app.scope().search_path(["one"]);
    let is_refused = |outcome: Result<()>, line: u32| {
        let error = outcome.unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("search_path"), "{error}");
        assert!(error.to_string().contains(&format!("{}:{line}:", file!())), "{error}");
    };
    is_refused(tenant().run(|| app.create_all().map(drop)), line!());
    is_refused(tenant().run(|| db.create_all().map(drop)), line!());
    assert!(app.migrations().unwrap().iter().all(|migration| !migration.applied), "nothing was done");
    assert_eq!(app.create_all().unwrap().len(), 1);
    app.run(|| db.session()?.send(INSERT)).unwrap();
    is_refused(tenant().run(|| app.drop_all().map(drop)), line!());
    is_refused(tenant().run(|| db.drop_all().map(drop)), line!());
    is_refused(tenant().run(|| app.migrations().map(drop)), line!());
    assert_eq!(app.context(|| db.session()?.number("SELECT count(*) AS number FROM entries")).unwrap(), 1);
    // The scope says nothing of a context inside of it, or of another application.
    let other = C::app(test_db.config());
    let counts = tenant().run(|| Ok::<_, Error>((app.context(|| app.migrations())?.len(), other.migrations()?.len())));
    assert_eq!(counts.unwrap(), (1, 1));
    assert_eq!(tenant().run(|| other.drop_all()).unwrap().len(), 1);
}

const INSERT: &str = "INSERT INTO entries (author, message) VALUES ('Ada', 'Hello')";

/// The program that the documentation of `Scope::search_path` shows.
fn each_tenant_is_migrated_by_an_application_of_its_own() {
    let test_db = TestDatabase::postgres();
    let (app, db) = (PgConnection::app(test_db.config()), PgConnection::db());
    let mut plain = PgConnection::establish(&test_db.url()).unwrap();
    for tenant in TENANTS {
        plain.batch_execute(&format!("CREATE SCHEMA {}", quoted(tenant))).unwrap();
    }
    let of_tenant = |tenant: &str| {
        PgConnection::app(test_db.config().connection_init_sql(format!("SET search_path = {}, public", quoted(tenant))))
    };
    for tenant in TENANTS {
        let own = of_tenant(tenant);
        assert_eq!(own.create_all().unwrap().len(), 1);
        assert_eq!(own.create_all().unwrap().len(), 0);
        own.dispose().unwrap();
        app.scope().search_path([tenant]).run_and_commit(|| db.session()?.send(INSERT)).unwrap();
    }
    assert_eq!(of_tenant(TENANTS[0]).drop_all().unwrap().len(), 1);
    let left = "SELECT schemaname::text AS value FROM pg_tables WHERE tablename = 'entries' ORDER BY schemaname";
    let left: Vec<Value> = diesel::sql_query(left).load(&mut plain).unwrap();
    assert_eq!(left.into_iter().map(|row| row.value).collect::<Vec<_>>(), TENANTS[1..]);
}

fn test_that_is_rolled_back_has_the_search_path_of_each_scope() {
    static DB: Database<PgConnection> = Database::without_migrations();
    let config = Config::new(support::postgres().url());
    let test: TestApp<PgConnection> =
        TestSetup::of(&DB).config(config).isolation(TestIsolation::Rollback).start().unwrap();
    test.run(|| DB.session()?.with(make)).unwrap();
    for tenant in TENANTS {
        test.scope().search_path([tenant]).run_and_commit(|| add(&DB.session()?, 1, tenant)).unwrap();
        test.scope().search_path([tenant]).run(|| add(&DB.session()?, 2, "undone")).unwrap();
        assert_eq!(test.scope().search_path([tenant]).run(|| texts(&DB.session()?)).unwrap(), [tenant]);
        let refused = test.scope().search_path([tenant]).autocommit().run(|| texts(&DB.session()?));
        assert!(matches!(&refused, Err(error) if error.kind() == ErrorKind::InvalidConfig), "{refused:?}");
        // A scope without it finds none of them.
        assert!(test.scope().run(|| texts(&DB.session()?)).is_err());
    }
}
