//! Unions, which Diesel has for its own connections only.

use super::*;

#[test]
fn count_and_one_see_all_of_a_union() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            ["Ada", "Bob", "Cid"].into_iter().try_for_each(|name| add(&session, name).map(drop))?;
            let low = || users::table.filter(users::id.le(2)).select(users::name);
            let high = || users::table.filter(users::id.ge(2)).select(users::name);
            assert_eq!(session.load::<String>(low().union(high()))?.len(), 3);
            assert_eq!(session.count(low().union(high()))?, 3);
            assert_eq!(session.count(low().union_all(high()))?, 4);
            let only = || users::table.filter(users::id.eq(9)).select(users::name);
            assert_eq!(session.one::<String, _>(only().union(high().filter(users::id.eq(3))))?, "Cid");
            assert_error!(session.one::<String, _>(low().union(high())), TooManyRows);
            session.commit()
        })
    });
}

#[test]
fn union_of_selects_does_not_begin_a_transaction() {
    test(|shop| {
        shop.scope().isolation(Isolation::ReadCommitted).run(|| {
            let session = DB.session()?;
            let all = || users::table.select(users::name);
            session.load::<String>(all().union(all()))?;
            assert_eq!(session.count(all().union_all(all()))?, 0);
            assert!(!session.in_transaction());
            assert_eq!((shop.status().in_use, shop.in_transaction_now()), (0, false));
            Ok(())
        })
    });
}
