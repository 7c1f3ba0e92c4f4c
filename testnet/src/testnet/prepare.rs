//! The state that a testnet starts with.

use std::collections::BTreeSet;

use anyhow::bail;

use super::{SITES, UpOptions};
use crate::ports;
use crate::profile::{SITES_MAX, profiles};
use crate::state::{Directory, SiteState, State, Wish};

/// A state to start with: the one before, or a new one.
pub(super) fn prepare(
    directory: &Directory,
    before: Option<State>,
    options: &UpOptions,
) -> anyhow::Result<State> {
    let Some(mut state) = before else {
        return fresh(directory, options);
    };
    let differs = |what: &str, had: String, wanted: String| {
        anyhow::anyhow!(
            "the testnet in {} has {had} {what}, not {wanted}: start it as it is, or remove it first with krake-testnet down --purge",
            directory.path().display()
        )
    };
    let count = options.profiles.len();
    if count > 0 && count != state.sites.len() {
        let (had, wanted) = (state.sites.len().to_string(), count.to_string());
        return Err(differs("sites", had, wanted));
    }
    if let Some(kube) = options.kube.filter(|kube| *kube != state.kube) {
        let (had, wanted) = (state.kube.to_string(), kube.to_string());
        return Err(differs("Kubernetes", had, wanted));
    }
    if let Some(shards) = options.shards.filter(|shards| *shards != state.shards) {
        let (had, wanted) = (state.shards.to_string(), shards.to_string());
        return Err(differs("shards", had, wanted));
    }
    state.settings.extend(options.settings.clone());
    for site in &mut state.sites {
        site.wish = Wish::Running;
        site.node = None;
        site.cluster.clear();
        site.blocked.clear();
    }
    Ok(state)
}

fn fresh(directory: &Directory, options: &UpOptions) -> anyhow::Result<State> {
    let chosen = match options.profiles.len() {
        0 => profiles(SITES),
        1..=SITES_MAX => options.profiles.clone(),
        count => bail!("a testnet has 1 to {SITES_MAX} sites, not {count}"),
    };
    let taken = ports::allocate(directory.path(), chosen.len() * 3)?;
    let sites = chosen
        .into_iter()
        .zip(taken.chunks_exact(3))
        .map(|(profile, ports)| SiteState {
            profile,
            api_port: ports[0],
            peer_port: ports[1],
            cluster_port: ports[2],
            wish: Wish::Running,
            node: None,
            cluster: Vec::new(),
            blocked: BTreeSet::new(),
        })
        .collect();
    Ok(State::new(
        options.kube.unwrap_or_default(),
        options.shards.unwrap_or(16),
        options.settings.clone(),
        sites,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::KubeKind;

    #[test]
    fn a_restart_does_not_change_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::new(dir.path()).unwrap();
        let options = UpOptions::new(dir.path()).sites(3).unwrap();
        let mut before = fresh(&directory, &options).unwrap();
        assert_eq!(before.sites.len(), 3);
        before.sites[0]
            .profile
            .metrics
            .insert("carbon".to_owned(), 7.0);
        before.sites[0].blocked.insert("paris".to_owned());
        let again = prepare(
            &directory,
            Some(before.clone()),
            &UpOptions::new(dir.path()),
        )
        .unwrap();
        assert_eq!(again.sites[0].profile.metrics["carbon"], 7.0);
        assert_eq!(again.sites[1].api_port, before.sites[1].api_port);
        assert!(again.sites[0].blocked.is_empty());
        let other = UpOptions::new(dir.path()).sites(4).unwrap();
        let error = prepare(&directory, Some(before.clone()), &other).unwrap_err();
        assert!(error.to_string().contains("has 3 sites, not 4"), "{error}");
        let real = UpOptions {
            kube: Some(KubeKind::Real),
            ..UpOptions::new(dir.path())
        };
        let error = prepare(&directory, Some(before), &real).unwrap_err();
        assert!(error.to_string().contains("--purge"), "{error}");
    }
}
