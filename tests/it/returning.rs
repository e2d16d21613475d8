//! `RETURNING`, where both the database and Diesel's support of it have it.

use super::*;

#[test]
fn returning_gives_rows_of_what_was_changed() {
    test(|shop| {
        shop.scope().commit_on_ok().run(|| {
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
