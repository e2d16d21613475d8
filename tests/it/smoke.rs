use diesel::prelude::*;
use diesel_migrations::{EmbeddedMigrations, embed_migrations};
use diesel_session::{Config, Database, Result, ResultExt};

diesel::table! { entries (id) { id -> Integer, author -> Text, message -> Text, } }

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations/sqlite");
const PGM: EmbeddedMigrations = embed_migrations!("migrations/postgres");
static DB: Database<SqliteConnection> = Database::new(MIGRATIONS);
static PG: Database<PgConnection> = Database::new(PGM);

#[test]
fn sqlite() -> Result<()> {
    let app = DB.init_app("smoke", Config::new(":memory:"))?;
    let n = app.context(|| {
        assert_eq!(DB.create_all()?.len(), 1);
        assert_eq!(DB.create_all()?.len(), 0);
        let session = DB.session()?;
        session.execute(
            diesel::insert_into(entries::table).values((entries::author.eq("Ada"), entries::message.eq("hi"))),
        )?;
        let first: String = session.first(entries::table.select(entries::author))?;
        assert_eq!(first, "Ada");
        let none: Option<i32> =
            session.first(entries::table.filter(entries::id.eq(9)).select(entries::id)).optional()?;
        assert_eq!(none, None);
        let n: i64 = session.with(|conn| entries::table.count().get_result(conn))?;
        assert!(session.exists(entries::table)?);
        assert_eq!(session.count(entries::table)?, 1);
        session.commit()?;
        assert_eq!(session.count(entries::table)?, 1);
        let x = session.with(|conn| diesel::sql_query("COMMIT").execute(conn));
        println!("{x:?} {:?}", session.count(entries::table));
        session.rollback()?;
        session.remove()?;
        assert_eq!(DB.drop_all()?.len(), 1);
        diesel_session::Result::<_>::Ok(n)
    })?;
    assert_eq!(n, 1);
    println!("{}", app.status());
    println!("{}", app.dispose()?);
    Ok(())
}

#[test]
fn pg() -> Result<()> {
    let d = crate::support::postgres().create_database();
    let app = PG.init_app("smoke", Config::new(d.url()))?;
    app.context(|| {
        assert_eq!(PG.create_all()?.len(), 1);
        let session = PG.session()?;
        session.execute(
            diesel::insert_into(entries::table).values((entries::author.eq("Ada"), entries::message.eq("hi"))),
        )?;
        println!(
            "{:?}",
            session.execute(
                diesel::insert_into(entries::table).values((entries::author.eq(""), entries::message.eq("hi")))
            )
        );
        println!("{}", session.count(entries::table).unwrap_err());
        println!("{}", session.commit().unwrap_err());
        println!("{}", app.status());
        session.rollback()?;
        println!("{}", app.status());
        assert_eq!(PG.drop_all()?.len(), 1);
        diesel_session::Result::<_>::Ok(())
    })?;
    println!("{}", app.dispose()?);
    Ok(())
}
