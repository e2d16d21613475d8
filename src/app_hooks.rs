//! The hooks of a database object. Each receives the application.
//!
//! The layers of the pool and the session cannot name the application, so each hook is bound to its application in a
//! closure. A closure keeps no application alive.

use std::sync::{Arc, Weak};

use diesel::result::QueryResult;

use crate::app::{App, AppIdentity};
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::{AppEnd, PoolOf, Result};
use crate::pool::{ConnectionHook, PoolOptions};
use crate::session::{RowHook, RowHooks, Session, SessionFactory};
use crate::unit_of_work::Changes;
use crate::url::Target;

/// The functions of a database object. Each receives the application.
pub(crate) struct AppHooks<C: SessionConnection> {
    pub(crate) on_connect: Option<AppConnectionHook<C>>,
    pub(crate) on_checkout: Option<AppConnectionHook<C>>,
    pub(crate) on_checkin: Option<AppConnectionHook<C>>,
    pub(crate) on_close: Option<fn(&App<C>, &mut C)>,
    /// The functions that concern tracked rows, indexed by `ChangeEvent`.
    pub(crate) on_changes: [Option<ChangeHook<C>>; 5],
}

pub(crate) type ChangeHook<C> = fn(&App<C>, &Session<C>, &Changes) -> Result<()>;

pub(crate) type AppConnectionHook<C> = fn(&App<C>, &mut C) -> QueryResult<()>;

impl<C: SessionConnection> AppHooks<C> {
    pub(crate) const NONE: Self =
        Self { on_connect: None, on_checkout: None, on_checkin: None, on_close: None, on_changes: [None; 5] };

    /// Gives the pool its hooks and returns the hooks for the sessions, each with the application inside.
    pub(crate) fn bind(
        &self,
        factory: &Weak<SessionFactory<C>>,
        identity: &Arc<AppIdentity<C>>,
        options: &mut PoolOptions<C>,
    ) -> RowHooks<C> {
        let app = Arc::new(AppOfHooks {
            factory: Weak::clone(factory),
            identity: Arc::clone(identity),
            id: Arc::clone(&options.app),
            config: options.config.clone(),
            target: options.target.clone(),
            pool_of: options.pool_of,
        });
        let bind = |hook: Option<AppConnectionHook<C>>| {
            let (hook, app) = (hook?, Arc::clone(&app));
            let bound: ConnectionHook<C> = Arc::new(move |conn| hook(&app.get(), conn));
            Some(bound)
        };
        options.on_connect = bind(self.on_connect);
        options.on_checkout = bind(self.on_checkout);
        options.on_checkin = bind(self.on_checkin);
        options.on_close = self.on_close.map(|hook| {
            let app = Arc::clone(&app);
            let bound: ConnectionHook<C> = Arc::new(move |conn| {
                hook(&app.get(), conn);
                Ok(())
            });
            bound
        });
        self.on_changes.map(|hook| {
            let (hook, app) = (hook?, Arc::clone(&app));
            let bound: RowHook<C> = Arc::new(move |session, changes| hook(&app.get(), session, changes));
            Some(bound)
        })
    }
}

/// The application that hooks receive. It does not keep the application alive: a connection may outlive all handles and
/// sessions.
struct AppOfHooks<C: SessionConnection> {
    factory: Weak<SessionFactory<C>>,
    identity: Arc<AppIdentity<C>>,
    id: Arc<str>,
    config: Config,
    target: Target,
    pool_of: PoolOf,
}

impl<C: SessionConnection> AppOfHooks<C> {
    /// The application. If the program has dropped all of its handles and sessions, the result is a handle with the
    /// same id and URL that answers `Disposed`.
    fn get(&self) -> App<C> {
        if let Some(factory) = self.factory.upgrade() {
            return App::of_factory(factory, Arc::clone(&self.identity));
        }
        let options = PoolOptions {
            pool_of: self.pool_of,
            ..PoolOptions::new(Arc::clone(&self.id), self.config.clone(), self.target.clone())
        };
        let app = App::new(options, &AppHooks::NONE, Arc::clone(&self.identity));
        app.core().mark_ended(AppEnd::Removed);
        app
    }
}
