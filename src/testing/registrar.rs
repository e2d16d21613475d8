//! A database object as the test kit uses it.

use std::sync::Arc;

use diesel::migration::MigrationSource;

use super::pinned_connection::PinnedConnection;
use crate::app::App;
use crate::app_hooks::AppHooks;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::database::Database;
use crate::error::{AppEnd, PoolOf, Result};
use crate::pool::{PoolOptions, TransactionStyle};

/// A database object with any type of migrations, as the test kit uses it.
pub(super) trait Registrar<C: SessionConnection>: Sync {
    /// The number of the database object.
    fn number(&self) -> u64;

    /// Makes the application of a test, which is not registered.
    fn make(&self, id: String, config: Config, pinned: Option<Arc<PinnedConnection<C>>>) -> Result<App<C>>;

    /// The functions of the program that run on a new connection or change what a flush sends, as numbers. In one
    /// build of a program, equal numbers stand for the same functions.
    fn functions(&self) -> Vec<usize>;

    /// Whether a function of the program makes the connections.
    fn has_connect_with(&self) -> bool;

    /// Makes an application without the hooks and limits of the database object, which is not registered.
    fn make_bare(&self, id: String, config: Config) -> Result<App<C>>;

    fn register(&self, app: App<C>) -> Result<App<C>>;

    /// Frees the application's id. Its handles answer `Disposed` from then on.
    fn unregister(&self, app: &App<C>);
}

impl<C: SessionConnection, M: MigrationSource<C::Backend> + Send + Sync + 'static> Registrar<C> for Database<C, M> {
    fn number(&self) -> u64 {
        self.identity().database
    }

    fn make(&self, id: String, config: Config, pinned: Option<Arc<PinnedConnection<C>>>) -> Result<App<C>> {
        let options = self.options(id, config)?;
        Ok(self.new_app(match pinned {
            None => PoolOptions { pool_of: PoolOf::Test, ..options },
            Some(pinned) => PoolOptions {
                transactions: TransactionStyle(Some(Arc::clone(&pinned) as _)),
                owner: Some(pinned),
                pool_of: PoolOf::RolledBackTest,
                ..options
            },
        }))
    }

    fn functions(&self) -> Vec<usize> {
        // The address at which a program is loaded differs from run to run.
        let relative_address = |function: usize| function.wrapping_sub(base_of_functions as fn() as usize);
        let AppHooks { on_connect, on_checkout, on_changes, .. } = &self.hooks;
        let [before_flush, after_flush, before_commit_of_changes, ..] = *on_changes;
        let on_connection = [*on_connect, *on_checkout].map(|function| function.map(|function| function as usize));
        let connect = [self.connect_with.map(|function| function as usize)];
        let row_hooks =
            [before_flush, after_flush, before_commit_of_changes].map(|hook| hook.map(|hook| hook as usize));
        let all = on_connection.into_iter().chain(connect).chain(row_hooks);
        if all.clone().all(|function| function.is_none()) {
            return Vec::new();
        }
        all.map(|function| function.map_or(0, relative_address)).collect()
    }

    fn has_connect_with(&self) -> bool {
        self.connect_with.is_some()
    }

    fn make_bare(&self, id: String, config: Config) -> Result<App<C>> {
        self.new_bare_app(id, config)
    }

    fn register(&self, app: App<C>) -> Result<App<C>> {
        self.registry.add(app)
    }

    fn unregister(&self, app: &App<C>) {
        self.registry.remove_this(app);
        app.core().mark_ended(AppEnd::TestEnded);
    }
}

/// The address from which the functions of the program are counted.
fn base_of_functions() {}
