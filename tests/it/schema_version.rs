//! After a change of the schema no connection of the old schema is checked out.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use diesel::backend::Backend;
use diesel::connection::BoxableConnection;
use diesel::migration::{self, Migration, MigrationMetadata, MigrationName, MigrationSource};
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::result::ConnectionResult;
use diesel_session::{App, Config, Database, SessionConnection};

use crate::fixtures::{Step, TestDatabase, step};
use crate::for_each_database;

for_each_database!(only postgres =>
    schema_change_leaves_no_old_plans_and_types_on_postgres,
    connection_opened_during_a_migration_is_replaced,
    schema_change_reconnects_each_application_on_postgres,
);
for_each_database!(only mariadb => schema_change_reconnects_each_application_on_mariadb);
for_each_database!(only sqlite => schema_change_reconnects_each_application_on_sqlite);

/// One table whose column has another type after every other `drop_all`.
struct Changing {
    other: Arc<AtomicBool>,
    has_type: bool,
}

impl<DB: Backend> MigrationSource<DB> for Changing {
    fn migrations(&self) -> migration::Result<Vec<Box<dyn Migration<DB>>>> {
        let kind = if self.other.load(Ordering::Relaxed) { "VARCHAR(20)" } else { "TEXT" };
        let (up, down) = match self.has_type {
            true => ("CREATE TYPE mood AS ENUM ('good'); ", "; DROP TYPE mood"),
            false => ("", ""),
        };
        let mood = if self.has_type { "mood" } else { "VARCHAR(10)" };
        let up = format!("{up}CREATE TABLE pages (id INTEGER, title {kind}, mood {mood})");
        Ok(vec![Box::new(step("1", up, format!("DROP TABLE pages{down}")))])
    }
}

/// Two database objects, the first of which has the schema, and four applications.
struct Scene<C: SessionConnection> {
    _owner: Database<C, Changing>,
    _other: Database<C>,
    other_schema: Arc<AtomicBool>,
    apps: [App<C>; 4],
}

impl<C: SessionConnection> Scene<C> {
    /// `alias` is another address of the same server.
    fn new(url: &str, alias: &str, connect: Option<fn(&str) -> ConnectionResult<C>>) -> Self {
        let other_schema = Arc::new(AtomicBool::new(false));
        let migrations = Changing { other: Arc::clone(&other_schema), has_type: url.starts_with("postgres") };
        let (mut owner, mut other) = (Database::new(migrations), Database::without_migrations());
        if let Some(connect) = connect {
            (owner, other) = (owner.connect_with(connect), other.connect_with(connect));
        }
        let config = |url: &str| Config::new(url).max_size(4);
        let apps = [
            owner.init_app("owner", config(url)).unwrap(),
            owner.init_app("neighbour", config(url)).unwrap(),
            other.init_app("stranger", config(url)).unwrap(),
            other.init_app("elsewhere", config(alias)).unwrap(),
        ];
        Self { _owner: owner, _other: other, other_schema, apps }
    }

    /// `drop_all` and `create_all`, after which the schema is another one.
    fn change(&self) {
        self.other_schema.fetch_xor(true, Ordering::Relaxed);
        self.apps[0].drop_all().unwrap();
        self.apps[0].create_all().unwrap();
    }
}

diesel::table! { pages (id) { id -> Integer, title -> Text, mood -> crate::schema_version::MoodType, } }

#[derive(diesel::sql_types::SqlType, diesel::query_builder::QueryId, Debug)]
#[diesel(postgres_type(name = "mood"))]
pub struct MoodType;

#[derive(Debug, diesel::expression::AsExpression)]
#[diesel(sql_type = MoodType)]
pub struct Good;

impl diesel::serialize::ToSql<MoodType, diesel::pg::Pg> for Good {
    fn to_sql<'b>(&'b self, out: &mut diesel::serialize::Output<'b, '_, diesel::pg::Pg>) -> diesel::serialize::Result {
        std::io::Write::write_all(out, b"good")?;
        Ok(diesel::serialize::IsNull::No)
    }
}

/// What a program sends on every connection, prepared at its first use: of the enum, and of the other column.
fn use_schema(conn: &mut PgConnection) -> QueryResult<usize> {
    let page = (pages::id.eq(1), pages::title.eq("A"), pages::mood.eq(Good));
    diesel::insert_into(pages::table).values(page).execute(conn)?;
    Ok(pages::table.filter(pages::mood.eq(Good)).select(pages::title).load::<String>(conn)?.len())
}

fn use_title(conn: &mut PgConnection) -> QueryResult<Vec<String>> {
    pages::table.select(pages::title).load(conn)
}

fn schema_change_leaves_no_old_plans_and_types_on_postgres() {
    let test_db = TestDatabase::postgres();
    let scene = Scene::<PgConnection>::new(&test_db.url(), &test_db.socket_url(), None);
    let [owner, users @ ..] = &scene.apps;
    owner.create_all().unwrap();

    // The control: the same statements, with r2d2 alone.
    let manager = diesel::r2d2::ConnectionManager::<PgConnection>::new(test_db.url());
    let plain = r2d2::Pool::builder().max_size(1).build(manager).unwrap();
    use_schema(&mut plain.get().unwrap()).unwrap();
    let titles = r2d2::Pool::builder()
        .max_size(1)
        .build(diesel::r2d2::ConnectionManager::<PgConnection>::new(test_db.url()))
        .unwrap();
    use_title(&mut titles.get().unwrap()).unwrap();

    for _ in 0..3 {
        // Two of each application, both warm; the second is out while the schema changes.
        let sessions: Vec<_> =
            users.iter().map(|app| (app.open_session().unwrap(), app.open_session().unwrap())).collect();
        for (idle, out) in &sessions {
            for session in [idle, out] {
                session.begin().unwrap();
            }
            for session in [idle, out] {
                session.with(use_schema).unwrap();
                session.with(use_title).unwrap();
                session.commit().unwrap();
            }
            out.begin().unwrap();
        }
        for app in users {
            assert_eq!((app.status().idle, app.status().in_use), (1, 1), "{}", app.status());
        }
        scene.change();
        // Nothing of the old schema was used in this transaction.
        for (_, out) in &sessions {
            out.commit().unwrap();
        }
        for app in users {
            assert_eq!(app.status().in_use, 0);
            assert!(app.status().open <= 1, "what was out is closed: {}", app.status());
        }
        for (idle, out) in &sessions {
            for session in [idle, out] {
                session.begin().unwrap();
            }
            for session in [idle, out] {
                session.with(use_schema).unwrap();
                session.with(use_title).unwrap();
                session.commit().unwrap();
            }
        }
    }

    // r2d2's own test at the checkout finds nothing wrong, and the connection stays as it is.
    for _ in 0..2 {
        let error = use_schema(&mut plain.get().unwrap()).unwrap_err().to_string();
        assert!(error.contains("cache lookup failed for type"), "{error}");
        let error = use_title(&mut titles.get().unwrap()).unwrap_err().to_string();
        assert!(error.contains("cached plan must not change result type"), "{error}");
    }
    drop((plain, titles));
    for app in &scene.apps {
        app.dispose().unwrap();
    }
}

/// The migration replaces the type. Before it commits, another application opens a connection and uses the type.
struct Meanwhile {
    step: Step,
    user: App<PgConnection>,
}

impl Migration<Pg> for Meanwhile {
    fn run(&self, conn: &mut dyn BoxableConnection<Pg>) -> migration::Result<()> {
        Migration::<Pg>::run(&self.step, conn)?;
        let session = self.user.open_session()?;
        session.begin()?;
        assert_eq!(self.user.status().open, 1, "it is a new one");
        session.with(use_type)?;
        Ok(session.commit()?)
    }

    fn revert(&self, conn: &mut dyn BoxableConnection<Pg>) -> migration::Result<()> {
        Migration::<Pg>::revert(&self.step, conn)
    }

    fn metadata(&self) -> &dyn MigrationMetadata {
        Migration::<Pg>::metadata(&self.step)
    }

    fn name(&self) -> &dyn MigrationName {
        Migration::<Pg>::name(&self.step)
    }
}

/// The first migration, and the second one once there is an application for it.
struct Both(Mutex<Option<App<PgConnection>>>);

impl MigrationSource<Pg> for Both {
    fn migrations(&self) -> migration::Result<Vec<Box<dyn Migration<Pg>>>> {
        let create = "CREATE TYPE mood AS ENUM ('good')";
        let mut all: Vec<Box<dyn Migration<Pg>>> = vec![Box::new(step("1", create, "DROP TYPE mood"))];
        if let Some(user) = self.0.lock().unwrap().clone() {
            let step = step("2", format!("DROP TYPE mood; {create}"), "SELECT 1");
            all.push(Box::new(Meanwhile { step, user }));
        }
        Ok(all)
    }
}

impl MigrationSource<Pg> for &'static Both {
    fn migrations(&self) -> migration::Result<Vec<Box<dyn Migration<Pg>>>> {
        (**self).migrations()
    }
}

fn use_type(conn: &mut PgConnection) -> QueryResult<bool> {
    diesel::select(Good.into_sql::<MoodType>().eq(Good)).get_result(conn)
}

fn connection_opened_during_a_migration_is_replaced() {
    static MIGRATIONS: Both = Both(Mutex::new(None));
    let test_db = TestDatabase::postgres();
    let (db, other) = (Database::<PgConnection, _>::new(&MIGRATIONS), Database::<PgConnection>::without_migrations());
    let owner = db.init_app("owner", test_db.config()).unwrap();
    let user = other.init_app("user", test_db.config()).unwrap();
    assert_eq!(owner.create_all().unwrap(), ["1"]);
    *MIGRATIONS.0.lock().unwrap() = Some(user.clone());
    assert_eq!(owner.create_all().unwrap(), ["2"]);
    let session = user.open_session().unwrap();
    assert!(session.with(use_type).unwrap());
    session.commit().unwrap();
    *MIGRATIONS.0.lock().unwrap() = None;
    owner.dispose().unwrap();
    user.dispose().unwrap();
}

/// MariaDB and SQLite prepare such statements again by themselves. The connections are replaced all the same.
fn assert_schema_change_reconnects<C: crate::fixtures::TestConnection>(
    url: &str,
    alias: &str,
    connect: fn(&str) -> ConnectionResult<C>,
    connects: &AtomicUsize,
) {
    let scene = Scene::new(url, alias, Some(connect));
    let [owner, users @ ..] = &scene.apps;
    owner.create_all().unwrap();
    let ping_all = || users.iter().for_each(|app| app.ping().unwrap());
    ping_all();
    let before = connects.load(Ordering::Relaxed);
    ping_all();
    assert_eq!(connects.load(Ordering::Relaxed), before, "they stay open otherwise");
    assert_eq!(owner.create_all().unwrap().len(), 0);
    // The owner's own connection has run migrations, and was closed.
    let before = connects.load(Ordering::Relaxed);
    ping_all();
    assert_eq!(connects.load(Ordering::Relaxed), before, "nothing was changed");
    for _ in 0..2 {
        scene.change();
        let before = connects.load(Ordering::Relaxed);
        ping_all();
        // A connect to a server that other tests have filled is tried again.
        assert!(connects.load(Ordering::Relaxed) - before >= users.len(), "each application has reconnected");
        assert!(users.iter().all(|app| app.status().open == 1));
    }
    for app in &scene.apps {
        app.dispose().unwrap();
    }
}

macro_rules! reconnects {
    ($test:ident, $connection:ty, $test_db:expr, $alias:expr) => {
        fn $test() {
            static CONNECTS: AtomicUsize = AtomicUsize::new(0);
            fn connect(url: &str) -> ConnectionResult<$connection> {
                CONNECTS.fetch_add(1, Ordering::Relaxed);
                <$connection>::establish(url)
            }
            let test_db: TestDatabase = $test_db;
            let alias: fn(&TestDatabase) -> String = $alias;
            assert_schema_change_reconnects::<$connection>(&test_db.url(), &alias(&test_db), connect, &CONNECTS);
        }
    };
}

reconnects!(
    schema_change_reconnects_each_application_on_mariadb,
    MysqlConnection,
    TestDatabase::mariadb(),
    TestDatabase::socket_url
);
reconnects!(
    schema_change_reconnects_each_application_on_postgres,
    PgConnection,
    TestDatabase::postgres(),
    TestDatabase::socket_url
);
reconnects!(
    schema_change_reconnects_each_application_on_sqlite,
    SqliteConnection,
    TestDatabase::sqlite(),
    |test_db| format!("file:{}?cache=private", test_db.url())
);

/// Databases in memory have nothing to do with each other.
#[test]
fn in_memory_databases_have_separate_schema_versions() {
    let scene = Scene::<SqliteConnection>::new(":memory:", ":memory:", None);
    let [owner, user, ..] = &scene.apps;
    owner.create_all().unwrap();
    let session = user.open_session().unwrap();
    session.with(|conn| diesel::connection::SimpleConnection::batch_execute(conn, "SELECT 1")).unwrap();
    session.commit().unwrap();
    scene.change();
    session.begin().unwrap();
    assert_eq!((user.status().open, user.status().in_use), (1, 1));
    session.rollback().unwrap();
    for app in &scene.apps {
        app.dispose().unwrap();
    }
}
