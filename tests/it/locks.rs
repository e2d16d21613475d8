//! Locking reads of rows that the session keeps.

use diesel_session::Tracked;

use diesel_session::unit_of_work::RowState;

use super::*;
use crate::blog::*;

/// A writer, a country of 100 people, and a session that has read both in its transaction before another connection
/// changed them.
pub fn changed_by_another(body: impl FnOnce(&Shop<Conn>, &Session<Conn>, &Tracked<CountryName>) -> Result<()>) {
    test_on(Fixture::sql("blog", tables(KIND)), |shop| {
        elsewhere(
            shop,
            "INSERT INTO countries (code, name, people, area, landlocked, flag) VALUES ('nl', 'known', 100, 0, false, '')",
        );
        elsewhere(shop, "INSERT INTO writers (name) VALUES ('Ada')");
        elsewhere(shop, "INSERT INTO articles (writer_id, title, body) SELECT id, 'Hello', 'known' FROM writers");
        shop.context(|| {
            let session = DB.session()?;
            let row = session.find::<CountryName>("nl")?;
            session.track::<Writer>(writers::table)?;
            session.track::<Article>(articles::table)?;
            elsewhere(shop, "UPDATE countries SET name = 'theirs'");
            elsewhere(shop, "UPDATE writers SET email = 'theirs', version = version + 1");
            elsewhere(shop, "UPDATE articles SET body = 'theirs'");
            body(shop, &session, &row)
        })
    });
}

#[track_caller]
fn elsewhere(shop: &Shop<Conn>, sql: &str) {
    assert!(shop.other_connection().write(sql), "{sql}");
}

fn stored(shop: &Shop<Conn>) -> Vec<String> {
    shop.ask("SELECT name AS value FROM countries")
}

#[test]
fn locking_read_refreshes_a_tracked_row() {
    changed_by_another(|shop, session, row| {
        // What is known wins over a plain query.
        session.track::<CountryName>(countries::table.select(CountryName::as_select()))?;
        assert_eq!(row.read().name, "known");
        let locked = session.track(countries::table.find("nl").select(CountryName::as_select()).for_update())?;
        assert_eq!((&locked[0], row.read().name.as_str()), (row, "theirs"));
        row.update(|row| row.name += " and mine");
        session.commit()?;
        assert_eq!(stored(shop), ["theirs and mine"]);
        Ok(())
    });
}

#[test]
fn locking_read_of_the_first_row_refreshes_it() {
    changed_by_another(|shop, session, row| {
        let query = countries::table.select(CountryName::as_select()).for_update().skip_locked();
        assert_eq!(&session.track(query)?[0], row);
        row.update(|row| row.name += " and mine");
        session.flush()?;
        let query = countries::table.select(CountryName::as_select()).for_update().no_wait();
        assert_eq!((&session.track(query)?[0], row.read().name.as_str()), (row, "theirs and mine"));
        session.commit()?;
        assert_eq!(stored(shop), ["theirs and mine"]);
        Ok(())
    });
}

#[test]
fn locking_read_of_a_join_refreshes_the_rows_of_both_tables() {
    changed_by_another(|shop, session, _| {
        let query = articles::table.inner_join(writers::table).select(<(Article, Writer)>::as_select()).for_update();
        let (article, writer) = session.track(query)?.remove(0);
        assert_eq!((article.read().body.as_str(), writer.read().email.as_deref()), ("theirs", Some("theirs")));
        article.update(|article| article.body += " and mine");
        writer.update(|writer| writer.email = Some("mine".into()));
        session.commit()?;
        assert_eq!(shop.ask("SELECT body AS value FROM articles"), ["theirs and mine"]);
        assert_eq!(shop.ask("SELECT email AS value FROM writers"), ["mine"]);
        Ok(())
    });
}

#[test]
fn locking_read_takes_in_what_was_not_written() {
    changed_by_another(|shop, session, _| {
        let article = session.track::<Article>(articles::table)?.remove(0);
        let writer = session.track::<Writer>(writers::table)?.remove(0);
        session.no_autoflush(|session| {
            article.write().title = "mine".into();
            let query = articles::table.select(Article::as_select()).for_update();
            session.track(query)?;
            assert_eq!((article.read().title.as_str(), article.read().body.as_str()), ("mine", "theirs"));
            article.update(|article| article.body += " and mine");
            // With a version the write was made for the row that was read before.
            writer.write().email = Some("mine".into());
            session.track(writers::table.select(Writer::as_select()).for_update())?;
            assert_eq!((writer.read().version, writer.read().email.as_deref()), (1, Some("mine")));
            Ok::<_, Error>(())
        })?;
        assert_is!(session.flush(), Err(error) if error.kind() == ErrorKind::Stale && error.entity() == Some("Writer"));
        session.rollback()?;
        session.no_autoflush(|session| {
            article.write().title = "mine".into();
            session.track(articles::table.select(Article::as_select()).for_update())?;
            article.update(|article| article.body += " and mine");
            Ok::<_, Error>(())
        })?;
        session.commit()?;
        assert_eq!(shop.ask("SELECT body AS value FROM articles"), ["theirs and mine"]);
        assert_eq!(shop.ask("SELECT title AS value FROM articles"), ["mine"]);
        Ok(())
    });
}

/// Where the transaction's snapshot is older than the lock, a plain SELECT would find the old row.
#[test]
fn locked_row_that_expires_is_read_with_a_lock() {
    changed_by_another(|shop, session, row| {
        let lock = || countries::table.find("nl").select(CountryName::as_select()).for_update();
        session.track(lock())?;
        session.refresh(row)?;
        assert_eq!(row.read().name, "theirs");
        // Statements that change something else expire it.
        session.execute(diesel::update(articles::table).set(articles::title.eq("other")))?;
        assert_eq!(row.state(), RowState::Expired);
        session.track::<CountryName>(countries::table.select(CountryName::as_select()))?;
        assert_eq!(row.read().name, "theirs");
        row.update(|row| row.name += " and mine");
        session.flush()?;
        session.execute(diesel::update(articles::table).set(articles::title.eq("another")))?;
        assert_eq!(session.find::<CountryName>("nl")?.read().name, "theirs and mine");
        session.commit()?;
        assert_eq!(stored(shop), ["theirs and mine"]);
        Ok(())
    });
}

#[test]
fn query_after_a_statement_gives_a_locked_row_as_it_is_now() {
    changed_by_another(|shop, session, row| {
        session.track(countries::table.find("nl").select(CountryName::as_select()).for_update())?;
        // What the transaction has changed itself is newer than what it has locked.
        session.execute(diesel::sql_query("UPDATE countries SET name = 'by a statement'"))?;
        session.track::<CountryName>(countries::table.select(CountryName::as_select()))?;
        assert_eq!((row.state(), row.read().name.as_str()), (RowState::Persistent, "by a statement"));
        session.execute(diesel::sql_query("UPDATE countries SET name = 'by another one'"))?;
        session.get_many::<CountryName>(["nl"])?;
        assert_eq!(row.read().name, "by another one");
        // A query without a lock does not see the change of another connection.
        session.execute(diesel::sql_query("UPDATE writers SET email = 'by a statement'"))?;
        session.track::<CountryName>(countries::table.select(CountryName::as_select()))?;
        assert_eq!(row.read().name, "by another one");
        row.update(|row| row.name += " and mine");
        session.commit()?;
        assert_eq!(stored(shop), ["by another one and mine"]);
        Ok(())
    });
}

#[test]
fn locked_row_whose_update_was_undone_is_read_with_a_lock() {
    changed_by_another(|shop, session, row| {
        session.track(countries::table.find("nl").select(CountryName::as_select()).for_update())?;
        let undone = session.savepoint(|session| {
            row.write().name = "undone".into();
            session.flush()?;
            Err::<(), _>(Error::from(diesel::result::Error::NotFound))
        });
        assert!(undone.is_err());
        assert_eq!(row.state(), RowState::RolledBack);
        session.track::<CountryName>(countries::table.select(CountryName::as_select()))?;
        row.update(|row| row.name += " and mine");
        session.commit()?;
        assert_eq!(stored(shop), ["theirs and mine"]);
        Ok(())
    });
}
