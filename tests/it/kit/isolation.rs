//! What holds in every isolation.

use super::*;

in_every_way!(
    it_is_empty_each_time_and_gone_afterwards,
    two_at_a_time_do_not_see_each_other,
    fixtures_are_there,
    a_connection_that_is_held_is_reported,
);

fn it_is_empty_each_time_and_gone_afterwards<C: Conn>(way: (Config, TestIsolation)) {
    for _ in 0..3 {
        let test = begin::<C>(&way);
        assert_eq!(test.migrations().unwrap().iter().filter(|migration| !migration.applied).count(), 0);
        test.context(|| {
            let session = C::db().session()?;
            assert_eq!(session.number(COUNT)?, 0, "{way:?}");
            session.send(INSERT)?;
            session.commit()
        })
        .unwrap();
        assert_eq!(committed(&test), 1);
        let app = test.app().clone();
        test.finish().unwrap();
        let error = app.open_session().unwrap_err();
        assert!(error.is_disposed() && matches!(error, Error::Disposed { how: AppEnd::TestEnded, .. }), "{error}");
        assert!(C::db().app(app.id()).is_err());
    }
}

fn two_at_a_time_do_not_see_each_other<C: Conn>(way: (Config, TestIsolation)) {
    let (first, second) = (begin::<C>(&way), begin::<C>(&way));
    assert_ne!(first.id(), second.id());
    for (test, rows) in [(&first, 1), (&second, 1), (&first, 2)] {
        test.scope()
            .commit_on_ok()
            .run(|| -> Result<()> {
                C::db().session()?.send(INSERT)?;
                assert_eq!(C::db().session()?.number(COUNT)?, rows, "{way:?}");
                Ok(())
            })
            .unwrap();
    }
    first.finish().unwrap();
    assert_eq!(committed(&second), 1);
    second.finish().unwrap();
}

fn one_more<C: Conn>(session: &Session<C>) -> Result<()> {
    session.send(INSERT)
}

fn fixtures_are_there<C: Conn>(way: (Config, TestIsolation)) {
    for _ in 0..2 {
        let (config, isolation) = way.clone();
        let test = TestSetup::of(C::db())
            .config(config)
            .isolation(isolation)
            .fixture(Fixture::sql("a row", format!("{INSERT}; -- and no more")))
            .fixture(Fixture::function("one more", one_more::<C>))
            .start()
            .unwrap();
        assert_eq!(committed(&test), 2, "{way:?}");
        test.finish().unwrap();
    }
    let (config, isolation) = way.clone();
    let broken = TestSetup::of(C::db())
        .config(config)
        .isolation(isolation)
        .fixture(Fixture::sql("a row that cannot be", "INSERT INTO nowhere VALUES (1)"))
        .start();
    let text = broken.unwrap_err().to_string();
    assert!(text.contains("a row that cannot be") && text.contains("nowhere"), "{text}");
}

fn a_connection_that_is_held_is_reported<C: Conn>(way: (Config, TestIsolation)) {
    let test = begin::<C>(&way);
    let app = test.app().clone();
    let (begun, wait) = (Arc::new(std::sync::Barrier::new(2)), Arc::new(std::sync::Barrier::new(2)));
    let holder = std::thread::spawn({
        let (begun, wait) = (Arc::clone(&begun), Arc::clone(&wait));
        move || {
            let session = app.open_session().unwrap();
            session.send(INSERT).unwrap();
            begun.wait();
            wait.wait();
        }
    });
    begun.wait();
    let error = test.finish().unwrap_err();
    wait.wait();
    holder.join().unwrap();
    assert!(matches!(&error, Error::TestLeftovers { .. } | Error::TestSpoiled { .. }), "{way:?}: {error}");
    assert!(error.to_string().contains("isolation.rs"), "{way:?}: {error}");
    // The next one is none the worse for it.
    let next = begin::<C>(&way);
    assert_eq!(committed(&next), 0);
    next.finish().unwrap();
}
