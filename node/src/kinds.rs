//! The kinds under `krake.dev/v1`, as data.

use krake_kube_api::{Column, Kind};
use serde_json::{Value, json};

/// Their group.
pub const GROUP: &str = "krake.dev";
/// Their version.
pub const VERSION: &str = "v1";
/// The finalizer that keeps an application until no site holds a copy.
pub const FINALIZER: &str = "krake.dev/copies";
/// Holds a site that is being deleted until its node is no member any more.
pub const MEMBER_FINALIZER: &str = "krake.dev/member";
/// Annotation of a site that is to leave without waiting for what runs there.
pub const FORCED: &str = "krake.dev/forced";

fn kind(name: &str, plural: &str, short: &[&str], namespaced: bool) -> Kind {
    Kind {
        group: GROUP.to_owned(),
        version: VERSION.to_owned(),
        kind: name.to_owned(),
        plural: plural.to_owned(),
        singular: name.to_lowercase(),
        short_names: short.iter().map(|s| (*s).to_owned()).collect(),
        categories: Vec::new(),
        namespaced,
        status: false,
        read_only: true,
        schema: None,
        columns: Vec::new(),
    }
}

fn text(description: &str) -> Value {
    json!({"type": "string", "description": description})
}

fn object(description: &str, properties: &Value) -> Value {
    json!({"type": "object", "description": description, "properties": properties})
}

fn free(description: &str) -> Value {
    json!({"type": "object", "description": description, "x-kubernetes-preserve-unknown-fields": true})
}

fn application_schema() -> Value {
    let manifest = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true,
        "x-kubernetes-embedded-resource": true, "description": "A Kubernetes object."});
    let mut source = object(
        "What runs.",
        &json!({"manifests": {"type": "array", "description": "Kubernetes objects, in the namespace of the application. The list is atomic: who applies it owns all of it.",
            "items": manifest, "x-kubernetes-list-type": "atomic", "minItems": 1}}),
    );
    source["required"] = json!(["manifests"]);
    let placement = object(
        "Where it may and should run.",
        &json!({
            "require": {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "atomic",
                "description": "Constraints over labels (`country in (DE, SE)`) and raw metric values (`carbon <= 400`); all must hold."},
            "weights": {"type": "object", "additionalProperties": {"type": "number"},
                "description": "Weight of each metric in the score; replaces the federation's defaults."},
            "stickiness": {"type": "number", "minimum": 0, "maximum": 1,
                "description": "How much better, in score, another site must be before the application moves (default 0.1)."},
            "maxMetricAge": text("Sites with an older report are not considered (such as 15m)."),
            "reschedule": object("How often a better site is looked for.", &json!({
                "interval": text("Time between two looks at all sites (such as 60s)."),
                "holdFor": text("How long another site must have been better before the application moves."),
            })),
        }),
    );
    let migration = object(
        "How it moves to a better site.",
        &json!({
            "enabled": {"type": "boolean", "description": "Whether it moves at all (default true)."},
            "strategy": {"type": "string", "enum": ["surge", "recreate"],
                "description": "surge: the new copy is ready before the old one is deleted. recreate: the old one is gone first."},
            "readyTimeout": text("How long a new copy may take to become ready before the move is given up."),
        }),
    );
    let failover = object(
        "What happens when its site is lost.",
        &json!({
            "mode": {"type": "string", "enum": ["prompt", "never"], "description": "prompt: it runs elsewhere. never: it waits for its site."},
            "detectAfter": text("Silence after which its site counts as lost (such as 15s; at least 3s)."),
        }),
    );
    let mut spec = object(
        "What is asked for.",
        &json!({"source": source, "placement": placement, "migration": migration, "failover": failover}),
    );
    spec["required"] = json!(["source"]);
    let mut schema = object(
        "An application: plain Kubernetes manifests and a policy where they may run.",
        &json!({"spec": spec, "status": free("What the federation says of it; written by the federation only.")}),
    );
    schema["required"] = json!(["spec"]);
    schema
}

fn age() -> Column {
    Column::new(
        "Age",
        ".metadata.creationTimestamp",
        "Time since it was made.",
    )
    .date()
}

/// All kinds.
pub fn all() -> Vec<Kind> {
    let active = |field: &str| format!(".status.copies[?(@.role==\"active\")].{field}");
    let application = Kind {
        status: true,
        read_only: false,
        categories: vec!["all".to_owned()],
        schema: Some(application_schema()),
        columns: vec![
            Column::new("Phase", ".status.phase", "One word for its state."),
            Column::new("Ready", &active("ready"), "Ready and wanted pods."),
            Column::new("Site", &active("site"), "Where it runs."),
            age(),
            Column::new("State", &active("state"), "What the site says.").wide(),
            Column::new("Namespace", &active("namespace"), "Namespace at the site.").wide(),
            Column::new(
                "Message",
                ".status.conditions[?(@.type==\"Ready\")].message",
                "Why.",
            )
            .wide(),
        ],
        ..kind("Application", "applications", &["app", "apps"], true)
    };
    let site = Kind {
        read_only: false,
        schema: Some(object(
            "A site: one operator's cluster in one place.",
            &json!({
                "spec": object("What is committed about it.", &json!({
                    "operator": text("Who runs it."),
                    "node": text("Its node's id."),
                    "cordoned": {"type": "boolean", "description": "It takes no new applications, and its node leads no group that another one can lead."},
                    "location": free("Where it is."),
                    "backends": free("What it runs applications on, by name, with the API kinds that each serves."),
                    "labels": {"type": "object", "additionalProperties": {"type": "string"}, "description": "What label constraints see."},
                })),
                "status": free("Its newest report; not part of the committed state."),
            }),
        )),
        columns: vec![
            Column::new("State", ".status.state", "Alive, Leaving, Suspect or Lost."),
            Column::new(
                "Cordoned",
                ".spec.cordoned",
                "It takes no new applications, and its node leads no group that another one can lead.",
            ),
            Column::new("Country", ".spec.location.country", "Where it is."),
            Column::new("Carbon", ".status.metrics.carbon", "g/kWh"),
            Column::new("Price", ".status.metrics.price", "EUR/kWh"),
            Column::new("PUE", ".status.metrics.pue", "Power usage effectiveness"),
            Column::new("ERF", ".status.metrics.erf", "Energy reuse factor"),
            Column::new(
                "CPU-Free",
                ".status.backends.default.freeCpu",
                "Cores not used.",
            ),
            Column::new("Report", ".status.reportAge", "Age of its report."),
            age(),
            Column::new("Operator", ".spec.operator", "Who runs it.").wide(),
            Column::new("Place", ".spec.location.place", "City.").wide(),
            Column::new("Node", ".spec.node", "Its node's id.").wide(),
            Column::new("Leaving", ".status.leaving", "What still keeps it.").wide(),
        ],
        ..kind("Site", "sites", &[], false)
    };
    let placement = Kind {
        columns: vec![
            Column::new("Site", ".status.copies[*].site", "Who holds a copy."),
            Column::new("State", ".status.copies[*].state", "What the sites say."),
            Column::new(
                "Outcome",
                ".status.decision.outcome",
                "What was decided last.",
            ),
            Column::new("Trigger", ".status.decision.trigger", "Why then."),
            age(),
            Column::new("Reason", ".status.decision.reason", "Why there.").wide(),
        ],
        ..kind("Placement", "placements", &["pl"], true)
    };
    let [event, core_event] = events();
    vec![application, site, placement, node(), event, core_event]
}

fn node() -> Kind {
    Kind {
        columns: vec![
            Column::new("Site", ".spec.site", "Its site."),
            Column::new("State", ".status.state", "Alive, Suspect or Lost."),
            Column::new("Leads", ".status.leads", "Groups it leads."),
            Column::new(
                "RTT-ms",
                ".status.rttMillis",
                "Round-trip time from the node asked.",
            ),
            Column::new("Version", ".status.version", "Its program."),
            age(),
            Column::new("Id", ".spec.node", "Its id.").wide(),
            Column::new(
                "Addresses",
                ".spec.addresses",
                "Where other nodes reach it.",
            )
            .wide(),
        ],
        ..kind("Node", "nodes", &["no"], false)
    }
}

fn events() -> [Kind; 2] {
    let event_columns = vec![
        Column::new("Last Seen", ".lastTimestamp", "When.").date(),
        Column::new("Type", ".type", "Normal or Warning."),
        Column::new("Reason", ".reason", "What happened."),
        Column::new("Object", ".involvedObject.name", "To what."),
        Column::new("Message", ".message", "A sentence."),
    ];
    let event = Kind {
        columns: event_columns,
        ..kind("Event", "events", &["ev"], true)
    };
    // kubectl describe asks for events in the core group.
    let core_event = Kind {
        group: String::new(),
        ..event.clone()
    };
    [event, core_event]
}
