//! The applications of a database object.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::app::App;
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};

/// The applications by their ids.
pub(crate) struct Registry<C: SessionConnection> {
    apps: RwLock<BTreeMap<String, App<C>>>,
    /// The place in the program that makes the database object.
    made_at: Place,
}

impl<C: SessionConnection> Registry<C> {
    pub(crate) const fn new(made_at: Place) -> Self {
        Self { apps: RwLock::new(BTreeMap::new()), made_at }
    }

    pub(crate) fn add(&self, app: App<C>) -> Result<App<C>> {
        let mut apps = self.write();
        if apps.contains_key(app.id()) {
            return Err(Error::AlreadyRegistered { app: app.id().into() });
        }
        apps.insert(app.id().into(), app.clone());
        Ok(app)
    }

    pub(crate) fn get(&self, id: &str, at: Place) -> Result<App<C>> {
        let apps = self.read();
        apps.get(id).cloned().ok_or_else(|| self.unknown(id, &apps, at))
    }

    pub(crate) fn remove(&self, id: &str, at: Place) -> Result<App<C>> {
        let mut apps = self.write();
        match apps.remove(id) {
            Some(app) => Ok(app),
            None => Err(self.unknown(id, &apps, at)),
        }
    }

    /// Removes this application, but no other one with the same id.
    #[cfg(feature = "testing")]
    pub(crate) fn remove_this(&self, app: &App<C>) {
        let mut apps = self.write();
        if apps.get(app.id()).is_some_and(|other| other.is_same_app(app)) {
            let removed = apps.remove(app.id());
            drop(apps);
            drop(removed);
        }
    }

    pub(crate) fn all(&self) -> Vec<App<C>> {
        self.read().values().cloned().collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<String, App<C>>> {
        self.apps.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<String, App<C>>> {
        self.apps.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn unknown(&self, id: &str, apps: &BTreeMap<String, App<C>>, at: Place) -> Error {
        // Ten ids are enough to see a misspelling; a program may have thousands.
        let mut known: Vec<String> = apps.keys().take(10).cloned().collect();
        if apps.len() > known.len() {
            known.push(format!("and {} more", apps.len() - known.len()));
        }
        let connection = std::any::type_name::<C>().rsplit("::").next().unwrap_or_default();
        let database = format!("the `Database<{connection}>` that is made at {}", self.made_at);
        Error::UnknownApp { app: crate::wording::name(id), database, at, known }
    }
}
