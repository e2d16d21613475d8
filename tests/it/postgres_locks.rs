//! PostgreSQL's own locking reads.

use super::locks::changed_by_another;
use super::*;
use crate::blog::*;

#[test]
fn every_locking_clause_refreshes_a_tracked_row() {
    changed_by_another(|shop, session, row| {
        let query = || countries::table.find("nl").select(CountryName::as_select());
        let rename = |name: &str| {
            session.commit()?;
            session.find::<CountryName>("nl")?;
            assert!(shop.other_connection().write(&format!("UPDATE countries SET name = '{name}'")));
            Ok::<_, Error>(())
        };
        session.track(query().for_share())?;
        assert_eq!(row.read().name, "theirs");
        rename("no key update")?;
        session.track(query().for_no_key_update())?;
        assert_eq!(row.read().name, "no key update");
        rename("key share")?;
        session.track(query().for_key_share().skip_locked())?;
        assert_eq!(row.read().name, "key share");
        rename("share")?;
        session.track(query().for_share().no_wait())?;
        assert_eq!(row.read().name, "share");
        session.commit()
    });
}

#[diesel::declare_sql_function]
extern "SQL" {
    fn pg_advisory_xact_lock(key: diesel::sql_types::BigInt) -> diesel::sql_types::Text;
}

#[test]
fn lock_on_rows_that_the_query_does_not_give_is_for_what_is_read_afterwards() {
    changed_by_another(|shop, session, row| {
        // By plain values, tracked or not.
        session.load::<i64>(countries::table.select(countries::people).for_update())?;
        assert_eq!(session.find::<CountryName>("nl")?.read().name, "theirs");
        session.commit()?;
        session.find::<CountryName>("nl")?;
        assert!(shop.other_connection().write("UPDATE countries SET name = 'again'"));
        session.track::<i64>(countries::table.select(countries::people).for_update())?;
        row.update(|row| row.name += " and mine");
        session.commit()?;
        assert_eq!(row.read().name, "again and mine");
        // By a join of which one side is given.
        let article = session.track_first::<Article>(articles::table)?;
        session.track::<Writer>(writers::table)?;
        assert!(shop.other_connection().write("UPDATE articles SET body = 'again'"));
        session.track(articles::table.inner_join(writers::table).select(Writer::as_select()).for_update())?;
        article.update(|article| article.body += " and mine");
        session.commit()?;
        assert_eq!(article.read().body, "again and mine");
        // By a function.
        session.find::<CountryName>("nl")?;
        assert!(shop.other_connection().write("UPDATE countries SET name = 'at last'"));
        let lock = sql_query("SELECT pg_advisory_xact_lock(7)::text AS value");
        session.load::<Value>(lock)?;
        assert_eq!(session.find::<CountryName>("nl")?.read().name, "at last");
        assert!(shop.other_connection().write("UPDATE countries SET name = 'the last'"));
        session.exists(diesel::select(pg_advisory_xact_lock(7).is_not_null()))?;
        assert_eq!(session.find::<CountryName>("nl")?.read().name, "the last");
        session.commit()
    });
}
