//! The default isolation of the connection decides whether a default scope reads outside of a transaction.

use diesel_session::testing::TestApp;

use super::*;
use crate::support::{Mariadb, postgres};

for_each_database!(postgres, any_postgres =>
    default_of_the_postgres_database_decides,
    default_of_the_postgres_role_decides,
    default_in_the_postgres_url_decides,
);
for_each_database!(postgres, any_postgres, mariadb, any_mariadb =>
    default_set_by_on_connect_decides,
    default_set_by_init_sql_decides,
);
for_each_database!(mariadb, any_mariadb =>
    default_of_mariadb_is_repeatable_read,
    default_of_the_mariadb_server_decides,
);

const SERIALIZABLE: &str = match KIND {
    Kind::Mariadb => "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    _ => "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
};

const BACK_TO_READ_COMMITTED: &str = match KIND {
    Kind::Mariadb => READ_COMMITTED,
    _ => "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED",
};

fn set_serializable(_: &App<Conn>, conn: &mut Conn) -> QueryResult<()> {
    conn.batch_execute(SERIALIZABLE)
}

fn set_read_committed(_: &App<Conn>, conn: &mut Conn) -> QueryResult<()> {
    conn.batch_execute(BACK_TO_READ_COMMITTED)
}

static STRICT: Database<Conn> = connected().on_connect(set_serializable);
static LOOSE: Database<Conn> = connected().on_connect(set_read_committed);

/// Whether the first read of a default scope begins a transaction.
#[track_caller]
fn begins_at_a_read(shop: &Shop<Conn>, db: &Database<Conn>) -> bool {
    // The second scope gets the connection of the first one.
    let seen = [(); 2].map(|()| {
        shop.context(|| {
            let session = db.session()?;
            session.count(users::table)?;
            Ok(is_begun(shop, &session))
        })
        .unwrap()
    });
    assert_eq!(seen[0], seen[1]);
    seen[0]
}

/// The same for a database at some URL, with a pool of its own.
#[track_caller]
fn begins_at_url(shop: &Shop<Conn>, url: &str, options: impl FnOnce(Config) -> Config) -> bool {
    let name = format!("{} elsewhere", shop.id());
    let app = DB.init_app(&*name, options(Config::new(url))).unwrap();
    let begun = app.context(|| {
        let session = DB.session()?;
        session.count(users::table)?;
        assert_eq!(session.in_transaction(), shop.in_transaction_now());
        Ok(session.in_transaction())
    });
    DB.remove_app(&name).unwrap();
    begun.unwrap()
}

/// Changes a default of the database or the role, for connections that are opened from then on.
#[track_caller]
fn alter(shop: &Shop<Conn>, object: &str) {
    let name = shop.url();
    let name = name.rsplit('/').next().expect("a name");
    let sql = format!("ALTER {} SET default_transaction_isolation = 'repeatable read'", object.replace("NAME", name));
    postgres().admin().batch_execute(&sql).unwrap();
}

fn default_of_the_postgres_database_decides() {
    test(|shop| {
        assert!(!begins_at_url(shop, &shop.url(), |config| config));
        alter(shop, "DATABASE \"NAME\"");
        assert!(begins_at_url(shop, &shop.url(), |config| config));
        // What the connection sets by itself overrules it.
        assert!(!begins_at_url(shop, &shop.url(), |config| config.connection_init_sql(BACK_TO_READ_COMMITTED)));
        Ok(())
    });
}

fn default_of_the_postgres_role_decides() {
    test(|shop| {
        alter(shop, &format!("ROLE {} IN DATABASE \"NAME\"", support::ROLE));
        assert!(begins_at_url(shop, &shop.url(), |config| config));
        Ok(())
    });
}

fn default_in_the_postgres_url_decides() {
    test(|shop| {
        let url = |level| format!("{}?options=-c%20default_transaction_isolation%3D{level}", shop.url());
        for (level, begins) in [("serializable", true), ("repeatable%5C%20read", true), ("read%5C%20committed", false)]
        {
            assert_eq!(begins_at_url(shop, &url(level), |config| config), begins, "{level}");
        }
        Ok(())
    });
}

fn default_set_by_on_connect_decides() {
    run_test(setup(&STRICT, KIND, |config| config), KIND, |shop| {
        assert!(begins_at_a_read(shop, &STRICT));
        Ok(())
    });
    run_test(setup(&LOOSE, KIND, |config| config), KIND, |shop| {
        assert!(!begins_at_a_read(shop, &LOOSE));
        Ok(())
    });
}

fn default_set_by_init_sql_decides() {
    for (sql, begins) in [(SERIALIZABLE, true), (BACK_TO_READ_COMMITTED, false)] {
        test_with(
            |config| config.connection_init_sql(sql),
            |shop| {
                assert_eq!(begins_at_a_read(shop, &DB), begins, "{sql}");
                Ok(())
            },
        );
    }
}

fn default_of_mariadb_is_repeatable_read() {
    test(|shop| {
        assert!(begins_at_a_read(shop, &DB));
        let begun = shop.scope().isolation(Isolation::ReadCommitted).run(|| {
            let session = DB.session()?;
            session.count(users::table)?;
            Ok::<_, Error>(is_begun(shop, &session))
        });
        assert!(!begun?);
        Ok(())
    });
}

fn default_of_the_mariadb_server_decides() {
    let server = Mariadb::start_with(&["--transaction-isolation=READ-COMMITTED"]);
    let fixture = Fixture::sql("tables", Kind::Mariadb.tables());
    let setup = diesel_session::testing::TestSetup::of(&DB).config(Config::new(server.url())).fixture(fixture);
    let test: TestApp<Conn> = setup.start().unwrap();
    test.context(|| {
        let session = DB.session()?;
        session.count(users::table)?;
        assert!(!session.in_transaction());
        assert_eq!(test.status().in_use, 0);
        Ok(())
    })
    .unwrap();
    test.finish().unwrap();
}
