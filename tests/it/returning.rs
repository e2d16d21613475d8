//! `RETURNING`, on the databases for which Diesel supports it.

use diesel_session::unit_of_work::RowState;

use super::*;
use crate::blog::*;

#[test]
fn returning_gives_rows_of_what_was_changed() {
    test(|shop| {
        shop.run(|| {
            let session = DB.session()?;
            let new = NewUser { name: "Ada", age: None };
            let ada: User = session.get_result(diesel::insert_into(users::table).values(&new))?;
            assert_eq!(ada, User { id: ada.id, name: "Ada".into(), age: None });
            let insert = diesel::insert_into(users::table).values(users::name.eq("Bob")).returning(users::id);
            let bob: i32 = session.get_result(insert)?;
            assert_ne!(bob, ada.id);
            let updated: Vec<User> =
                session.load(diesel::update(users::table).set(users::age.eq(1)).returning(User::as_returning()))?;
            assert_eq!(updated.iter().map(|user| user.age).collect::<Vec<_>>(), [Some(1), Some(1)]);
            let gone: Vec<String> = session.load(diesel::delete(users::table.find(ada.id)).returning(users::name))?;
            assert_eq!(gone, ["Ada"]);
            let none: Option<i32> =
                session.get_result(diesel::delete(users::table.find(ada.id)).returning(users::id)).optional()?;
            assert_eq!(none, None);
            Ok::<(), Error>(())
        })?;
        assert_eq!(shop.names(), ["Bob"]);
        Ok(())
    });
}

#[test]
fn an_insert_that_returns_rows_takes_part_in_the_transaction() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let insert = diesel::insert_into(users::table).values(users::name.eq("Ada")).returning(users::id);
            session.get_result::<i32>(insert)?;
            assert!(session.in_transaction());
            Ok::<(), Error>(())
        })?;
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn tracked_rows_of_a_write_have_the_newest_values() {
    test_on(Fixture::sql("blog", tables(KIND)), |shop| {
        let elsewhere = |sql: &str| assert!(shop.other_connection().write(sql), "{sql}");
        elsewhere(
            "INSERT INTO countries (code, name, people, area, landlocked, flag) VALUES ('nl', 'known', 100, 0, false, '')",
        );
        shop.context(|| {
            let session = DB.session()?;
            let row = session.find::<CountryName>("nl")?;
            elsewhere("UPDATE countries SET name = 'theirs'");
            let new = NewCountry {
                code: "nl".into(),
                name: "ignored".into(),
                people: 1,
                area: 0.0,
                landlocked: false,
                flag: Vec::new(),
                founded: None,
            };
            let upsert = diesel::insert_into(countries::table)
                .values(new)
                .on_conflict(countries::code)
                .do_update()
                .set(countries::people.eq(countries::people + 1))
                .returning(CountryName::as_returning());
            let tracked = session.track(upsert)?;
            assert_eq!((&tracked[0], row.read().name.as_str()), (&row, "theirs"));
            assert_eq!(row.state(), RowState::Persistent);
            row.update(|row| row.name += " and mine");
            session.flush()?;
            let update = diesel::update(countries::table).set(countries::name.eq("set"));
            session.track(update.returning(CountryName::as_returning()))?;
            assert_eq!(row.read().name, "set");
            let gone = session.track(diesel::delete(countries::table).returning(CountryName::as_returning()))?;
            assert_eq!((&gone[0], row.state()), (&row, RowState::Expired));
            assert_eq!(session.get::<CountryName>("nl")?, None);
            session.rollback()?;
            assert_eq!(session.find::<CountryName>("nl")?.read().name, "theirs");
            Ok(())
        })
    });
}
