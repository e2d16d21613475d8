//! What holds in every isolation.

use diesel_session::ErrorKind;

use super::*;

for_each_database!(Isolations; postgres, mariadb, sqlite, any_postgres =>
    test_database_begins_empty_and_is_removed,
    concurrent_tests_do_not_see_each_others_rows,
    fixtures_are_applied_to_each_test,
    finish_reports_a_held_connection,
);

fn test_database_begins_empty_and_is_removed<C: TestConnection>(isolations: &Isolations) {
    for way in &isolations.0 {
        for _ in 0..3 {
            let test = begin::<C>(way);
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
            assert!(
                error.is_disposed()
                    && error.kind() == ErrorKind::Disposed
                    && error.app_end() == Some(AppEnd::TestEnded),
                "{error}"
            );
            assert!(C::db().app(app.id()).is_err());
        }
    }
}

fn concurrent_tests_do_not_see_each_others_rows<C: TestConnection>(isolations: &Isolations) {
    for way in &isolations.0 {
        let (first, second) = (begin::<C>(way), begin::<C>(way));
        assert_ne!(first.id(), second.id());
        for (test, rows) in [(&first, 1), (&second, 1), (&first, 2)] {
            test.run(|| -> Result<()> {
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
}

fn one_more<C: TestConnection>(session: &Session<C>) -> Result<()> {
    session.send(INSERT)
}

fn fixtures_are_applied_to_each_test<C: TestConnection>(isolations: &Isolations) {
    for way in &isolations.0 {
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
}

fn finish_reports_a_held_connection<C: TestConnection>(isolations: &Isolations) {
    for way in &isolations.0 {
        let test = begin::<C>(way);
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
        assert!(
            (error.kind() == ErrorKind::TestLeftovers || error.kind() == ErrorKind::TestInvalidated),
            "{way:?}: {error}"
        );
        assert!(error.to_string().contains("isolation.rs"), "{way:?}: {error}");
        // The next one is none the worse for it.
        let next = begin::<C>(way);
        assert_eq!(committed(&next), 0);
        next.finish().unwrap();
    }
}
