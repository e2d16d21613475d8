//! Several tenants in schemas of one database.

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::sql_types::Text;
use diesel_session::testing::{TestApp, TestIsolation, TestSetup};
use diesel_session::{App, Config, Database, Error, Reset, Result, Session};

use crate::fixtures::{Conn, Site, Speak, connect_any};
use crate::on_every_database;
use crate::support::{self, Kind, enabled};

on_every_database!(
    search_path_is_an_error_where_there_is_none,
    schema_operations_are_refused_in_a_scope_with_search_path,
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

#[test]
fn each_scope_reads_and_writes_its_own_tenant() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    make(&mut connect_any(&site.url()).unwrap()).unwrap();
    let app = PgConnection::app(site.config().max_size(1).reset(Reset::Never));
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
    let mut plain = PgConnection::establish(&site.url()).unwrap();
    for tenant in TENANTS {
        let sql = format!("SELECT text AS value FROM {}.notes ORDER BY id", quoted(tenant));
        let rows: Vec<Value> = diesel::sql_query(sql).load(&mut plain).unwrap();
        let rows: Vec<_> = rows.into_iter().map(|row| row.value).collect();
        assert_eq!(rows, [1, 2, 3].map(|number| format!("{tenant} {number}")));
    }
}

#[test]
fn search_path_goes_with_every_other_choice_of_a_scope() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    make(&mut connect_any(&site.url()).unwrap()).unwrap();
    let app = PgConnection::app(site.config());
    let db = PgConnection::db();
    let limit = std::time::Duration::from_secs(60);
    let isolation = diesel_session::Isolation::Serializable;
    app.scope()
        .search_path(["one"])
        .isolation(isolation)
        .deadline(limit)
        .resolvable()
        .commit_on_ok()
        .run(|| add(&db.session()?, 1, "one"))
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
        matches!(&outside, Err(Error::InvalidConfig { reason, .. }) if reason.contains("autocommit")),
        "{outside:?}"
    );
    assert_eq!(app.status().in_use, 0);
    let read = app.scope().search_path(["one"]).run(|| texts(&db.session()?)).unwrap();
    assert_eq!(read, ["one", "two"]);
    // Without any schema no table is found.
    assert!(app.scope().search_path([""; 0]).run(|| texts(&db.session()?)).is_err());
}

fn search_path_is_an_error_where_there_is_none<C: Conn>(site: &Site) {
    let app = C::app(site.config());
    let run = |app: &App<C>| app.scope().search_path(["public"]).run(|| C::db().session()?.send("SELECT 1"));
    match site {
        Site::Postgres(_) => run(&app).unwrap(),
        Site::Mysql(_) | Site::Sqlite(_) => {
            let refused = run(&app).unwrap_err();
            assert!(
                matches!(&refused, Error::InvalidConfig { reason, .. } if reason.contains("PostgreSQL")),
                "{refused}"
            );
            app.context(|| C::db().session()?.send("SELECT 1")).unwrap();
        }
    }
    assert_eq!(app.status().in_use, 0);
}

fn schema_operations_are_refused_in_a_scope_with_search_path<C: Conn>(site: &Site) {
    let (app, db) = (C::app(site.config()), C::db());
    let tenant = || app.scope().search_path(["one"]);
    let is_refused = |outcome: Result<()>, line: u32| {
        let error = outcome.unwrap_err();
        assert!(matches!(&error, Error::InvalidConfig { reason, .. } if reason.contains("search_path")), "{error}");
        assert!(error.to_string().contains(&format!("{}:{line}:", file!())), "{error}");
    };
    is_refused(tenant().run(|| app.create_all().map(drop)), line!());
    is_refused(tenant().run(|| db.create_all().map(drop)), line!());
    assert!(app.migrations().unwrap().iter().all(|migration| !migration.applied), "nothing was done");
    assert_eq!(app.create_all().unwrap().len(), 1);
    app.scope().commit_on_ok().run(|| db.session()?.send(INSERT)).unwrap();
    is_refused(tenant().run(|| app.drop_all().map(drop)), line!());
    is_refused(tenant().run(|| db.drop_all().map(drop)), line!());
    is_refused(tenant().run(|| app.migrations().map(drop)), line!());
    assert_eq!(app.context(|| db.session()?.number("SELECT count(*) AS number FROM entries")).unwrap(), 1);
    // The scope says nothing of a context inside of it, or of another application.
    let other = C::app(site.config());
    let counts = tenant().run(|| Ok::<_, Error>((app.context(|| app.migrations())?.len(), other.migrations()?.len())));
    assert_eq!(counts.unwrap(), (1, 1));
    assert_eq!(tenant().run(|| other.drop_all()).unwrap().len(), 1);
}

const INSERT: &str = "INSERT INTO entries (author, message) VALUES ('Ada', 'Hello')";

/// The program that the documentation of `Scope::search_path` shows.
#[test]
fn each_tenant_is_migrated_by_an_application_of_its_own() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let (app, db) = (PgConnection::app(site.config()), PgConnection::db());
    let mut plain = PgConnection::establish(&site.url()).unwrap();
    for tenant in TENANTS {
        plain.batch_execute(&format!("CREATE SCHEMA {}", quoted(tenant))).unwrap();
    }
    let of_tenant = |tenant: &str| {
        PgConnection::app(site.config().on_connect(format!("SET search_path = {}, public", quoted(tenant))))
    };
    for tenant in TENANTS {
        let own = of_tenant(tenant);
        assert_eq!(own.create_all().unwrap().len(), 1);
        assert_eq!(own.create_all().unwrap().len(), 0);
        own.dispose().unwrap();
        app.scope().search_path([tenant]).commit_on_ok().run(|| db.session()?.send(INSERT)).unwrap();
    }
    assert_eq!(of_tenant(TENANTS[0]).drop_all().unwrap().len(), 1);
    let left = "SELECT schemaname::text AS value FROM pg_tables WHERE tablename = 'entries' ORDER BY schemaname";
    let left: Vec<Value> = diesel::sql_query(left).load(&mut plain).unwrap();
    assert_eq!(left.into_iter().map(|row| row.value).collect::<Vec<_>>(), TENANTS[1..]);
}

#[test]
fn test_that_is_rolled_back_has_the_search_path_of_each_scope() {
    if !enabled(Kind::Postgres) {
        return;
    }
    static DB: Database<PgConnection> = Database::without_migrations();
    let config = Config::new(support::postgres().url());
    let test: TestApp<PgConnection> =
        TestSetup::of(&DB).config(config).isolation(TestIsolation::Rollback).start().unwrap();
    test.scope().commit_on_ok().run(|| DB.session()?.with(make)).unwrap();
    for tenant in TENANTS {
        test.scope().search_path([tenant]).commit_on_ok().run(|| add(&DB.session()?, 1, tenant)).unwrap();
        test.scope().search_path([tenant]).run(|| add(&DB.session()?, 2, "undone")).unwrap();
        assert_eq!(test.scope().search_path([tenant]).run(|| texts(&DB.session()?)).unwrap(), [tenant]);
        let refused = test.scope().search_path([tenant]).autocommit().run(|| texts(&DB.session()?));
        assert!(matches!(refused, Err(Error::InvalidConfig { .. })), "{refused:?}");
        // A scope without it finds none of them.
        assert!(test.scope().run(|| texts(&DB.session()?)).is_err());
    }
}
